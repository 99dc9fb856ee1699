#include "guards.h"

#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

#include "key.h"

namespace py = pybind11;

namespace fastpeft {
namespace {

bool nothing_in(PyObject* container) {
  if (PyDict_Check(container)) return PyDict_GET_SIZE(container) == 0;
  if (PyList_Check(container)) return PyList_GET_SIZE(container) == 0;
  return PyAnySet_Check(container) && PySet_GET_SIZE(container) == 0;
}

constexpr uint64_t UNKNOWN = 0;

// Which state of all dictionaries' this is; later Pythons do not count them.
uint64_t changes(PyObject* dictionary) {
#if PY_VERSION_HEX < 0x030C0000
  return reinterpret_cast<PyDictObject*>(dictionary)->ma_version_tag;
#else
  return UNKNOWN;
#endif
}

Py_ssize_t length(PyObject* sequence) {
  return PyList_Check(sequence) ? PyList_GET_SIZE(sequence) : PyTuple_GET_SIZE(sequence);
}

PyObject* item(PyObject* sequence, Py_ssize_t i) {
  return PyList_Check(sequence) ? PyList_GET_ITEM(sequence, i) : PyTuple_GET_ITEM(sequence, i);
}

}  // namespace

void Guards::is(py::dict dictionary, py::object key, py::object value) {
  auto found = std::find_if(dictionaries_.begin(), dictionaries_.end(),
                            [&](const Dictionary& other) { return other.dictionary.is(dictionary); });
  if (found == dictionaries_.end()) found = dictionaries_.insert(found, {std::move(dictionary), {}, UNKNOWN});
  found->entries.emplace_back(std::move(key), std::move(value));
}

void Guards::absent(py::dict dictionary, py::object key) { is(std::move(dictionary), std::move(key), py::object()); }

bool Guards::Dictionary::holds() const {
  const uint64_t now = changes(dictionary.ptr());
  if (now != UNKNOWN && now == seen) return true;
  for (const auto& [key, value] : entries) {
    PyObject* const found = PyDict_GetItemWithError(dictionary.ptr(), key.ptr());
    if (!found && PyErr_Occurred()) throw py::error_already_set();
    if (found != value.ptr()) return false;
  }
  seen = now;
  return true;
}

void Guards::empty(py::object container) { empty_.push_back(std::move(container)); }

void Guards::items(py::object sequence) {
  if (!PyList_Check(sequence.ptr()) && !PyTuple_Check(sequence.ptr()))
    throw py::type_error("Guards.items: expected a list or a tuple");
  Items found{sequence, {}};
  for (Py_ssize_t i = 0; i < length(sequence.ptr()); ++i)
    found.objects.push_back(py::reinterpret_borrow<py::object>(item(sequence.ptr(), i)));
  items_.push_back(std::move(found));
}

void Guards::type(py::object object) {
  PyTypeObject* const type = Py_TYPE(object.ptr());
  kinds_.push_back({std::move(object), type});
}

void Guards::tensor(py::object tensor) {
  type(tensor);
  const at::Tensor& found = THPVariable_Unpack(tensor.ptr());
  tensors_.push_back({tensor, found.scalar_type(), found.device()});
}

void Guards::input(py::object like) {
  const at::Tensor& found = THPVariable_Unpack(like.ptr());
  dtype_ = found.scalar_type();
  device_ = found.device();
  autocast_ = autocasts(device_.type());
  made_ = true;
}

int64_t Guards::versions() const {
  int64_t sum = 0;
  for (const Facts& facts : tensors_) {
    const at::Tensor& tensor = THPVariable_Unpack(facts.tensor.ptr());
    sum += tensor.is_inference() ? 0 : static_cast<int64_t>(tensor._version());
  }
  return sum;
}

int Guards::visit(visitproc visit, void* arg) const {
  for (const Dictionary& dictionary : dictionaries_) {
    Py_VISIT(dictionary.dictionary.ptr());
    for (const auto& [key, value] : dictionary.entries) Py_VISIT(value.ptr());
  }
  for (const py::object& container : empty_) Py_VISIT(container.ptr());
  for (const Items& items : items_) {
    Py_VISIT(items.sequence.ptr());
    for (const py::object& object : items.objects) Py_VISIT(object.ptr());
  }
  for (const Kind& kind : kinds_) Py_VISIT(kind.object.ptr());
  for (const Facts& facts : tensors_) Py_VISIT(facts.tensor.ptr());
  return 0;
}

bool Guards::holds(py::handle x) const {
  if (!made_ || !thread_is_plain() || autocasts(device_.type()) != autocast_) return false;
  if (!x.is_none()) {
    if (!THPVariable_CheckExact(x.ptr())) return false;
    const at::Tensor& given = THPVariable_Unpack(x.ptr());
    if (given.scalar_type() != dtype_ || given.device() != device_ || given.layout() != at::kStrided ||
        given.is_nested())
      return false;
  }
  for (const Dictionary& dictionary : dictionaries_)
    if (!dictionary.holds()) return false;
  for (const py::object& container : empty_)
    if (!nothing_in(container.ptr())) return false;
  for (const Items& items : items_) {
    const auto count = static_cast<Py_ssize_t>(items.objects.size());
    if (length(items.sequence.ptr()) != count) return false;
    for (Py_ssize_t i = 0; i < count; ++i)
      if (item(items.sequence.ptr(), i) != items.objects[i].ptr()) return false;
  }
  for (const Kind& kind : kinds_)
    if (Py_TYPE(kind.object.ptr()) != kind.type) return false;
  for (const Facts& facts : tensors_) {
    const at::Tensor& tensor = THPVariable_Unpack(facts.tensor.ptr());
    if (tensor.scalar_type() != facts.dtype || tensor.device() != facts.device) return false;
  }
  return true;
}

}  // namespace fastpeft

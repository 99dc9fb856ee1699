#include "front.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <initializer_list>

#include "key.h"
#include "object.h"

namespace py = pybind11;

namespace fastpeft {
namespace {

// The fields of a _Round of fastpeft/nn/sharing.py.
enum { X, CONDITIONS, PLAN, VERSIONS, OUTPUTS };

PyObject* name(const char* text) { return PyUnicode_InternFromString(text); }

py::object attribute(const py::object& of, PyObject* name) {
  PyObject* const found = PyObject_GetAttr(of.ptr(), name);
  if (!found) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(found);
}

// What a dictionary has under a key, or null.
PyObject* item(const py::object& dictionary, PyObject* key) {
  PyObject* const found = PyDict_GetItemWithError(dictionary.ptr(), key);
  if (!found && PyErr_Occurred()) throw py::error_already_set();
  return found;
}

// As call_conditions of fastpeft/nn/conditions.py has them, without hooks.
py::tuple conditions(const at::Tensor& x) {
  const at::DeviceType type = x.device().type();
  const auto cast = autocasts(type) ? py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(
                                          torch::getTHPDtype(at::autocast::get_autocast_dtype(type))))
                                    : py::object(py::bool_(false));
  return py::make_tuple(x._version(), at::GradMode::is_enabled(), cast, py::none());
}

bool equal(PyObject* one, PyObject* other) {
  const int found = PyObject_RichCompareBool(one, other, Py_EQ);
  if (found < 0) throw py::error_already_set();
  return found;
}

}  // namespace

bool Bound::casts(const at::Tensor& x) const {
  if (x.scalar_type() == at::kDouble || !autocasts(x.device().type())) return false;
  const at::ScalarType wanted = at::autocast::get_autocast_dtype(x.device().type());
  const auto all = [](const py::tuple& tensors, const auto& fits) {
    return std::all_of(tensors.begin(), tensors.end(),
                       [&](const py::handle tensor) { return fits(THPVariable_Unpack(tensor.ptr()).scalar_type()); });
  };
  return x.scalar_type() != wanted || !all(cast_, [&](at::ScalarType dtype) { return dtype == wanted; }) ||
         !all(kept_, [&](at::ScalarType dtype) { return dtype == wanted || dtype == at::kFloat; });
}

py::object Bound::call(PyObject* x) const {
  if (!planned_ || !THPVariable_CheckExact(x) || casts(THPVariable_Unpack(x))) return py::none();
  PyObject* const* const given = &PyTuple_GET_ITEM(arguments_.ptr(), 0);
  c10::SmallVector<PyObject*, 16> arguments(given, given + PyTuple_GET_SIZE(arguments_.ptr()));
  arguments[place_] = x;
  return object<Planned>(planned_.ptr()).call(arguments.data(), static_cast<Py_ssize_t>(arguments.size()));
}

int Bound::visit(visitproc visit, void* arg) const {
  for (const py::object* held : std::initializer_list<const py::object*>{&planned_, &arguments_, &cast_, &kept_})
    Py_VISIT(held->ptr());
  return 0;
}

py::object Front::call(PyObject* layer, PyObject* x) const {
  // A replica copies the dictionary that this is in.
  if (layer != layer_.ptr() || x == Py_None || !object<Guards>(guards_.ptr()).holds(x)) return py::none();
  return group_.is_none() ? alone(x) : shared(x);
}

py::object Front::alone(PyObject* x) const {
  const py::object found = object<Bound>(bound_.ptr()).call(x);
  return found.is_none() ? found : found[py::int_(0)];
}

// As SharedInput.forward does it where nothing is recomputed.
py::object Front::shared(PyObject* x) const {
  static PyObject *const thread = name("_thread"), *const dict = name("__dict__"), *const pending = name("rounds"),
                         *const plans = name("_plans"), *const lead = name("_lead"),
                         *const unclaimed = name("_unclaimed"), *const guards = name("guards"),
                         *const drops = name("drops");
  const at::Tensor& given = THPVariable_Unpack(x);
  if (given.is_inference() || torch::autograd::get_current_graph_task_id() != -1 ||
      !at::SavedTensorDefaultHooks::get_tls_state().stack.empty())
    return py::none();
  const py::object local = attribute(attribute(group_, thread), dict);
  const auto rounds = py::reinterpret_borrow<py::object>(item(local, pending));
  if (!rounds || rounds.is_none()) return py::none();
  const py::tuple now = conditions(given);
  const auto last = py::reinterpret_borrow<py::object>(item(rounds, part_.ptr()));
  if (!last) {
    const auto plan = py::reinterpret_borrow<py::object>(item(attribute(group_, plans), me_.ptr()));
    if (!plan || !leads(plan, x)) return py::none();
    // Without gradients this may be what reentrant checkpointing computes again, which must draw the same masks.
    if (!at::GradMode::is_enabled() && attribute(plan, drops).ptr() == Py_True) return alone(x);
    return attribute(group_, lead)(me_, py::handle(x), plan, now, rounds);
  }
  const auto field = [&](int i) { return PyTuple_GET_ITEM(last.ptr(), i); };
  if (field(X) != x || !equal(field(CONDITIONS), now.ptr())) return py::none();
  const auto plan = py::reinterpret_borrow<py::object>(field(PLAN));
  if (!follows(plan)) return py::none();
  const py::int_ versions(object<Guards>(attribute(plan, guards).ptr()).versions());
  if (!equal(field(VERSIONS), versions.ptr())) return py::none();
  const auto outputs = py::reinterpret_borrow<py::object>(field(OUTPUTS));
  const auto output = py::reinterpret_borrow<py::object>(item(outputs, me_.ptr()));
  if (!output) return py::none();
  if (PyDict_DelItem(outputs.ptr(), me_.ptr())) throw py::error_already_set();
  if (PyDict_GET_SIZE(outputs.ptr()) == 0) {
    if (PyDict_DelItem(rounds.ptr(), part_.ptr())) throw py::error_already_set();
    if (PyObject_SetAttr(group_.ptr(), unclaimed, py::int_(0).ptr())) throw py::error_already_set();
  }
  return output;
}

// Whether a plan of the siblings has this layer as it is now, and guards.
bool Front::follows(const py::object& plan) const {
  static PyObject *const branches = name("branches"), *const guards = name("guards");
  if (attribute(plan, guards).is_none()) return false;
  PyObject* const found = item(attribute(plan, branches), me_.ptr());
  if (!found || !PyTuple_Check(found) || PyTuple_GET_SIZE(found) != PyTuple_GET_SIZE(branch_.ptr())) return false;
  PyObject* const* const items = &PyTuple_GET_ITEM(found, 0);
  return std::equal(items, items + PyTuple_GET_SIZE(found), &PyTuple_GET_ITEM(branch_.ptr(), 0));
}

// Whether it is what the siblings compute as things stand.
bool Front::leads(const py::object& plan, PyObject* x) const {
  static PyObject *const parts = name("parts"), *const current = name("_parts"), *const guards = name("guards");
  return follows(plan) && attribute(plan, parts).is(attribute(group_, current)) &&
         object<Guards>(attribute(plan, guards).ptr()).holds(x);
}

int Front::visit(visitproc visit, void* arg) const {
  for (const py::object* held : {&layer_, &guards_, &branch_, &bound_, &group_}) Py_VISIT(held->ptr());
  return 0;
}

}  // namespace fastpeft

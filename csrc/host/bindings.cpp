// Calls that were seen before, without Python. fastpeft/_plan.py records them, fastpeft/_host.py compiles this.
#include <ATen/ScalarOps.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/pybind.h>

#include "front.h"
#include "guards.h"
#include "object.h"
#include "planned.h"

namespace py = pybind11;
using namespace fastpeft;

namespace {

Argument argument(const py::handle& given, const c10::TypePtr& type) {
  if (py::isinstance<Ref>(given)) return given.cast<Ref>();
  if (py::isinstance<py::list>(given) && py::len(given) && py::isinstance<Ref>(given.cast<py::list>()[0]))
    return given.cast<std::vector<Ref>>();
  if (type->isSubtypeOf(*c10::TensorType::get()) && (PyFloat_Check(given.ptr()) || PyLong_Check(given.ptr()))) {
    // As PyTorch itself takes a number in a tensor's place: it does not widen the other's dtype.
    at::Tensor number = c10::scalar_to_tensor(torch::jit::toIValue(given, c10::NumberType::get()).toScalar());
    number.unsafeGetTensorImpl()->set_wrapped_number(true);
    return number;
  }
  return torch::jit::toIValue(given, type);
}

void add_call(Program& program, const std::string& name, const std::string& overload, const py::list& arguments,
              std::vector<int64_t> outputs) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
  const auto& schema = op.schema().arguments();
  Call step{op, {}, std::move(outputs)};
  for (size_t i = 0; i < schema.size(); ++i) step.arguments.push_back(argument(arguments[i], schema[i].type()));
  program.add(std::move(step));
}

void add_launch(Program& program, uintptr_t function, std::array<unsigned, 3> grid, unsigned threads, unsigned shared,
                const py::list& parameters) {
  Launch step{reinterpret_cast<void*>(function), {grid[0], grid[1], grid[2]}, threads, shared, {}, {}};
  for (const py::handle given : parameters) {
    const bool is_ref = py::isinstance<Ref>(given);
    if (is_ref) {
      const auto& ref = given.cast<const Ref&>();
      step.addresses.push_back({step.words.size(), ref.slot, ref.offset});
    }
    step.words.push_back(is_ref ? 0 : given.cast<uint64_t>());
  }
  program.add(std::move(step));
}

// Whether the C++ object is there: Python may collect before and after.
bool made(PyObject* self) {
  return reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder().holder_constructed();
}

// Python's collector of cycles looks into what often owns that which owns it.
template <class Class>
void collect(PyTypeObject* type) {
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    return made(self) ? object<Class>(self).visit(visit, arg) : 0;
  };
  type->tp_clear = [](PyObject* self) {
    if (made(self)) object<Class>(self).clear();
    return 0;
  };
}

// What a class does when it is called, past pybind11's choice among overloads, which costs what the call itself does.
template <class Class, py::object (*CALL)(Class&, PyObject* const*, Py_ssize_t)>
void callable(PyTypeObject* type) {
  type->tp_call = [](PyObject* self, PyObject* arguments, PyObject*) -> PyObject* {
    HANDLE_TH_ERRORS
    return CALL(object<Class>(self), &PyTuple_GET_ITEM(arguments, 0), PyTuple_GET_SIZE(arguments)).release().ptr();
    END_HANDLE_TH_ERRORS
  };
}

void expect(Py_ssize_t count, Py_ssize_t wanted) {
  if (count != wanted)
    throw py::type_error("expected " + std::to_string(wanted) + " arguments, got " + std::to_string(count));
}

py::object call_planned(Planned& planned, PyObject* const* arguments, Py_ssize_t count) {
  return planned.call(arguments, count);
}

py::object call_bound(Bound& bound, PyObject* const* arguments, Py_ssize_t count) {
  expect(count, 1);
  return bound.call(arguments[0]);
}

py::object call_front(Front& front, PyObject* const* arguments, Py_ssize_t count) {
  expect(count, 2);
  return front.call(arguments[0], arguments[1]);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  py::class_<Ref>(m, "Ref").def(py::init(
      [](int64_t slot, bool whole, int64_t offset, std::vector<int64_t> sizes, std::vector<int64_t> strides,
         at::ScalarType dtype) { return Ref{slot, whole, offset, std::move(sizes), std::move(strides), dtype}; }));
  py::class_<Program, std::shared_ptr<Program>>(m, "Program")
      .def(py::init<int64_t, std::vector<at::Tensor>, at::Device>())
      .def("empty", &Program::add_empty)
      .def("launch", &add_launch)
      .def("call", &add_call)
      .def("returns", &Program::returns)
      .def("run", &Program::run, py::call_guard<py::gil_scoped_release>());
  py::class_<Plan, std::shared_ptr<Plan>>(m, "Plan").def(
      py::init([](std::shared_ptr<Program> program, size_t outputs,
                  std::vector<std::pair<size_t, std::vector<int64_t>>> views, const py::object& backward) {
        return Plan{std::move(program), outputs, std::move(views),
                    backward.is_none() ? nullptr : std::make_shared<Backward>(backward)};
      }));
  py::class_<Guards>(m, "Guards",
                     py::custom_type_setup([](PyHeapTypeObject* heap) { collect<Guards>(&heap->ht_type); }))
      .def(py::init<>())
      .def("__call__", &Guards::holds)
      .def("is_", &Guards::is)
      .def("absent", &Guards::absent)
      .def("empty", &Guards::empty)
      .def("items", &Guards::items)
      .def("type", &Guards::type)
      .def("tensor", &Guards::tensor)
      .def("input", &Guards::input)
      .def("versions", &Guards::versions);
  py::class_<Planned>(m, "Planned", py::custom_type_setup([](PyHeapTypeObject* heap) {
                        callable<Planned, call_planned>(&heap->ht_type);
                      }))
      .def(py::init<py::object, py::object>())
      .def("clear", &Planned::clear)
      .def_property_readonly("plans", &Planned::plans);
  py::class_<Bound>(m, "Bound", py::custom_type_setup([](PyHeapTypeObject* heap) {
                      collect<Bound>(&heap->ht_type);
                      callable<Bound, call_bound>(&heap->ht_type);
                    }))
      .def(py::init<py::object, py::tuple, size_t, py::tuple, py::tuple>());
  py::class_<Front>(m, "Front", py::custom_type_setup([](PyHeapTypeObject* heap) {
                      collect<Front>(&heap->ht_type);
                      callable<Front, call_front>(&heap->ht_type);
                    }))
      .def(py::init<py::object, py::object, py::object, py::object, py::object, py::object, py::object>());
}

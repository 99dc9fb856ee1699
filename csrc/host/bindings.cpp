// Calls that were seen before, without Python. fastpeft/_plan.py records them, fastpeft/_host.py compiles this.
#include <ATen/ScalarOps.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/pybind.h>

#include "guards.h"
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
  Launch step{reinterpret_cast<void*>(function), {grid[0], grid[1], grid[2]}, threads, shared, {}};
  for (const py::handle given : parameters) {
    const bool is_ref = py::isinstance<Ref>(given);
    step.parameters.push_back({is_ref ? std::optional<Ref>(given.cast<Ref>()) : std::nullopt,
                               is_ref ? 0 : given.cast<uint64_t>()});
  }
  program.add(std::move(step));
}

// Whether the C++ object is there: Python may collect before and after.
bool made(PyObject* self) {
  return reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder().holder_constructed();
}

void add_empty(Program& program, int64_t slot, std::vector<int64_t> sizes, std::vector<int64_t> strides,
               at::ScalarType dtype, at::Device device) {
  program.add(Empty{slot, std::move(sizes), std::move(strides), dtype, device});
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  py::class_<Ref>(m, "Ref").def(py::init([](int64_t slot, bool whole, int64_t offset, std::vector<int64_t> sizes,
                                            std::vector<int64_t> strides, at::ScalarType dtype) {
    return Ref{slot, whole, offset, std::move(sizes), std::move(strides), dtype};
  }));
  py::class_<Program, std::shared_ptr<Program>>(m, "Program")
      .def(py::init<int64_t, std::vector<at::Tensor>, at::Device>())
      .def("empty", &add_empty)
      .def("launch", &add_launch)
      .def("call", &add_call)
      .def("returns", &Program::returns)
      .def("run", &Program::run, py::call_guard<py::gil_scoped_release>());
  py::class_<Plan, std::shared_ptr<Plan>>(m, "Plan")
      .def(py::init([](std::shared_ptr<Program> program, size_t outputs,
                       std::vector<std::pair<size_t, std::vector<int64_t>>> views, const py::object& backward) {
        return Plan{std::move(program), outputs, std::move(views),
                    backward.is_none() ? nullptr : std::make_shared<Backward>(backward)};
      }));
  const auto collected = py::custom_type_setup([](PyHeapTypeObject* heap) {
    PyTypeObject* const type = &heap->ht_type;
    type->tp_flags |= Py_TPFLAGS_HAVE_GC;
    type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
      Py_VISIT(Py_TYPE(self));
      return made(self) ? py::cast<Guards&>(py::handle(self)).visit(visit, arg) : 0;
    };
    type->tp_clear = [](PyObject* self) {
      if (made(self)) py::cast<Guards&>(py::handle(self)).clear();
      return 0;
    };
  });
  py::class_<Guards>(m, "Guards", collected)
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
  py::class_<Planned>(m, "Planned")
      .def(py::init<py::object, py::object>())
      .def("__call__", &Planned::call)
      .def("clear", &Planned::clear)
      .def_property_readonly("plans", &Planned::plans);
}

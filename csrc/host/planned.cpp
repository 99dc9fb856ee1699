#include "planned.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>

#include "key.h"

namespace py = pybind11;

namespace fastpeft {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int FIRST_RECORDED = 2;  // a shape that comes once, as in batches of any length, is not worth a plan
constexpr size_t MOST_PLANS = 4096;

py::object wrapped(const at::Tensor& tensor) {
  return tensor.defined() ? py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor)) : py::none();
}

py::list wrapped(const std::vector<at::Tensor>& tensors) {
  py::list list;
  for (const at::Tensor& tensor : tensors) list.append(wrapped(tensor));
  return list;
}

struct Node : torch::autograd::Function<Node> {
  struct Held : torch::CustomClassHolder {
    explicit Held(std::shared_ptr<const Plan> held) : plan(std::move(held)) {}
    std::shared_ptr<const Plan> plan;
  };

  static variable_list forward(AutogradContext* ctx, at::TensorList inputs, const std::shared_ptr<const Plan>& plan) {
    ctx->set_materialize_grads(false);
    variable_list found = plan->program->run(inputs.vec());
    ctx->save_for_backward({found.begin() + plan->outputs, found.end()});
    ctx->saved_data["plan"] = c10::IValue::make_capsule(c10::make_intrusive<Held>(plan));
    found.resize(plan->outputs);
    return found;
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const auto held = ctx->saved_data["plan"].toCapsule();
    const Plan& plan = *static_cast<const Held&>(*held).plan;
    variable_list found(plan.program->inputs());
    bool any = false;
    for (const at::Tensor& gradient : gradients) any |= gradient.defined();
    if (any) found = plan.backward->run(ctx->get_saved_variables(), std::move(gradients));
    found.emplace_back();  // of the plan
    return found;
  }
};

}  // namespace

Backward::~Backward() {
  if (!Py_IsInitialized()) {
    python_.release();
    return;
  }
  const py::gil_scoped_acquire lock;
  python_ = py::object();
}

std::vector<at::Tensor> Backward::in_python(const std::vector<at::Tensor>& saved,
                                            const std::vector<at::Tensor>& gradients, const std::string* key) {
  py::gil_scoped_acquire lock;
  const py::tuple found = python_(wrapped(saved), wrapped(gradients), key != nullptr);
  if (key && !found[1].is_none()) {
    const std::lock_guard<std::mutex> guard(mutex_);
    seen_[*key].program = found[1].cast<std::shared_ptr<const Program>>();
  }
  std::vector<at::Tensor> tensors;
  for (const py::handle item : found[0].cast<py::list>())
    tensors.push_back(item.is_none() ? at::Tensor() : THPVariable_Unpack(item.ptr()));
  return tensors;
}

std::vector<at::Tensor> Backward::run(std::vector<at::Tensor> saved, std::vector<at::Tensor> gradients) {
  // Gradients that are to be differentiated themselves come from the op's definition.
  if (at::GradMode::is_enabled()) return in_python(saved, gradients, nullptr);
  Key key;
  if (!key.add_tensors(saved) || !key.add_tensors(gradients)) return in_python(saved, gradients, nullptr);
  bool record = false;
  std::shared_ptr<const Program> program;
  {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (seen_.size() >= MOST_PLANS) seen_.clear();
    Seen& seen = seen_[key.bytes()];
    program = seen.program;
    record = !program && ++seen.times == FIRST_RECORDED;
  }
  if (program) return program->run(std::move(key.tensors()));
  return in_python(saved, gradients, record ? &key.bytes() : nullptr);
}

py::object Planned::call(const py::args& arguments) {
  Key key;
  if (!key.add_call(arguments.ptr())) return slow_(*arguments);
  if (seen_.size() >= MOST_PLANS) seen_.clear();
  Seen& seen = seen_[key.bytes()];
  const std::shared_ptr<const Plan> plan = seen.plan;
  if (!plan) {
    if (seen.refused || ++seen.times < FIRST_RECORDED) return slow_(*arguments);
    seen.refused = true;  // until it is recorded, which may call this again
    const py::tuple found = record_(arguments, wrapped(key.tensors()));
    if (!found[1].is_none()) seen_[key.bytes()].plan = found[1].cast<std::shared_ptr<const Plan>>();
    return found[0];
  }
  std::vector<at::Tensor> outputs;
  {
    const py::gil_scoped_release unlocked;
    std::vector<at::Tensor>& inputs = key.tensors();
    if (plan->backward) {
      for (const auto& [input, sizes] : plan->views) inputs[input] = inputs[input].view(sizes);
      outputs = Node::apply(at::TensorList(inputs), plan);  // a list, since into a vector autograd does not look
    } else {
      outputs = plan->program->run(std::move(inputs));
    }
    outputs.resize(plan->outputs);
  }
  return wrapped(outputs);
}

size_t Planned::plans() const {
  size_t count = 0;
  for (const auto& [key, seen] : seen_) count += seen.plan != nullptr;
  return count;
}

}  // namespace fastpeft

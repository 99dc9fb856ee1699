#include "planned.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <type_traits>

#include "key.h"

namespace py = pybind11;

namespace fastpeft {
namespace {

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

using torch::autograd::Edge;
using GraphPointer = decltype(Edge::function);  // of another kind up to torch 2.12

// The names below are looked up in PyTorch's namespace where they are used: not every version has each.
template <class Pointer>
Pointer made_node(torch::autograd::Node* node) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>)
    return Pointer(node, [](auto* gone) { deleteNode(gone); });
  else
    return Pointer::unsafe_steal_from_new(node);
}

template <class Pointer>
auto announce(const Pointer& node, int) -> decltype(fire_node_creation_hooks(node)) {
  return fire_node_creation_hooks(node);
}

template <class Pointer>
void announce(const Pointer&, long) {}

// A call in autograd's graph, as PyTorch's generated code has its own.
class Call : public torch::autograd::Node {
 public:
  Call(torch::autograd::edge_list&& edges, std::shared_ptr<const Plan> plan)
      : Node(std::move(edges)), plan_(std::move(plan)) {}

  std::string name() const override { return "FastpeftBackward"; }

  void save(const at::Tensor* begin, const at::Tensor* end) {
    saved_.reserve(end - begin);
    for (; begin != end; ++begin) saved_.emplace_back(*begin, begin->grad_fn().get() == this);
  }

  variable_list apply(variable_list&& gradients) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!std::any_of(gradients.begin(), gradients.end(), [](const auto& gradient) { return gradient.defined(); }))
      return variable_list(num_outputs());
    TORCH_CHECK(!released_, torch::autograd::ERR_BACKWARD_TWICE);
    variable_list saved;
    saved.reserve(saved_.size() + gradients.size());
    for (const auto& variable : saved_) saved.push_back(variable.unpack(getptr()));
    return plan_->backward->run(std::move(saved), std::move(gradients));
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    saved_.clear();
    released_ = true;
  }

 private:
  const std::shared_ptr<const Plan> plan_;
  std::vector<torch::autograd::SavedVariable> saved_;
  bool released_ = false;
};

// Runs a plan and enters it into autograd's graph.
std::vector<at::Tensor> differentiable(const std::vector<at::Tensor>& inputs, const std::shared_ptr<const Plan>& plan) {
  auto* const call = new Call(torch::autograd::collect_next_edges(inputs), plan);
  const auto node = made_node<GraphPointer>(call);
  std::vector<at::Tensor> found;
  {
    const at::AutoGradMode off(false);
    found = plan->program->run(inputs);
  }
  for (size_t i = 0; i < plan->outputs; ++i) {
    if (torch::autograd::isDifferentiableType(found[i].scalar_type()))
      torch::autograd::impl::set_gradient_edge(found[i], {node, call->add_input_metadata(found[i])});
    else
      call->add_input_metadata(torch::autograd::Node::undefined_input());  // as seeds, which have a place all the same
  }
  call->save(found.data() + plan->outputs, found.data() + found.size());
  announce(node, 0);
  return found;
}

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
  if (!program) return in_python(saved, gradients, record ? &key.bytes() : nullptr);
  for (at::Tensor& gradient : gradients)
    if (gradient.defined()) saved.push_back(std::move(gradient));
  return program->run(saved);
}

py::object Planned::call(PyObject* const* arguments, Py_ssize_t count) {
  Key key;
  const auto given = [&] {
    py::tuple tuple(count);
    for (Py_ssize_t i = 0; i < count; ++i) tuple[i] = py::reinterpret_borrow<py::object>(arguments[i]);
    return tuple;
  };
  if (!key.add_call(arguments, count)) return slow_(*given());
  if (seen_.size() >= MOST_PLANS) seen_.clear();
  Seen& seen = seen_[key.bytes()];
  const std::shared_ptr<const Plan> plan = seen.plan;
  if (!plan) {
    if (seen.refused || ++seen.times < FIRST_RECORDED) return slow_(*given());
    seen.refused = true;  // until it is recorded, which may call this again
    const py::tuple found = record_(given(), wrapped(key.tensors()));
    if (!found[1].is_none()) seen_[key.bytes()].plan = found[1].cast<std::shared_ptr<const Plan>>();
    return found[0];
  }
  std::vector<at::Tensor> outputs;
  {
    const py::gil_scoped_release unlocked;
    std::vector<at::Tensor>& inputs = key.tensors();
    if (plan->backward)
      for (const auto& [input, sizes] : plan->views) inputs[input] = inputs[input].view(sizes);
    outputs = plan->backward ? differentiable(inputs, plan) : plan->program->run(inputs);
  }
  outputs.resize(plan->outputs);
  return wrapped(outputs);
}

size_t Planned::plans() const {
  size_t count = 0;
  for (const auto& [key, seen] : seen_) count += seen.plan != nullptr;
  return count;
}

}  // namespace fastpeft

#include "program.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/SmallVector.h>
#include <pybind11/pybind11.h>

#include <limits>

#include "driver.h"

namespace fastpeft {
namespace {

constexpr int64_t KEPT = std::numeric_limits<int64_t>::max();  // in place of the step after which a slot is let go
constexpr int64_t ALIGNED = 512;                               // bytes, as those of PyTorch's allocator for GPUs

// The driver's handle of a stream.
template <class Stream>
auto handle(const Stream& stream, int) -> decltype(stream.native_handle()) {
  return stream.native_handle();
}

// Where PyTorch has none for C++ yet: of the current stream, which this is, by way of Python.
template <class Stream>
void* handle(const Stream& stream, long) {
  const pybind11::gil_scoped_acquire lock;
  const auto current = pybind11::module_::import("torch._C").attr("_cuda_getCurrentRawStream");
  return reinterpret_cast<void*>(current(int{stream.device_index()}).template cast<uintptr_t>());
}

uint64_t address(const at::Tensor& base, int64_t offset) {
  return reinterpret_cast<uint64_t>(base.const_data_ptr()) + offset;
}

at::Tensor view(const at::Tensor& base, const Ref& ref) {
  const caffe2::TypeMeta dtype = c10::scalarTypeToTypeMeta(ref.dtype);
  auto impl =
      c10::make_intrusive<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(), dtype);
  const int64_t first = base.storage_offset() * static_cast<int64_t>(base.itemsize()) + ref.offset;
  impl->set_sizes_and_strides(ref.sizes, ref.strides, first / static_cast<int64_t>(dtype.itemsize()));
  return at::Tensor(std::move(impl));
}

// The tensors of a run by their slots.
class Slots {
 public:
  Slots(const std::vector<at::Tensor>& inputs, const std::vector<at::Tensor>& constants, size_t count)
      : inputs_(inputs), constants_(constants), own_(inputs.size() + constants.size()), made_(count - own_) {}

  const at::Tensor& operator[](int64_t slot) const {
    const auto i = static_cast<size_t>(slot);
    return i < inputs_.size() ? inputs_[i] : i < own_ ? constants_[i - inputs_.size()] : made_[i - own_];
  }
  at::Tensor& made(int64_t slot) { return made_[slot - own_]; }

 private:
  const std::vector<at::Tensor>&inputs_, &constants_;
  const size_t own_;
  c10::SmallVector<at::Tensor, 24> made_;
};

at::Tensor tensor(const Slots& slots, const Ref& ref) {
  const at::Tensor& base = slots[ref.slot];
  return ref.whole ? base : view(base, ref);
}

c10::IValue value(const Slots& slots, const Argument& argument) {
  if (const auto* given = std::get_if<c10::IValue>(&argument)) return *given;
  if (const auto* ref = std::get_if<Ref>(&argument)) return tensor(slots, *ref);
  std::vector<at::Tensor> list;
  for (const Ref& ref : std::get<std::vector<Ref>>(argument)) list.push_back(tensor(slots, ref));
  return c10::List<at::Tensor>(std::move(list));
}

// As at::empty_strided, past PyTorch's dispatcher.
void run_step(const Empty& step, Slots& slots, void*, at::Device device) {
  const c10::OptionalDeviceGuard guard(step.device == device ? std::nullopt : std::optional(step.device));
  const c10::Storage memory(c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), step.bytes, step.allocator->allocate(step.bytes), step.allocator, true));
  for (const Empty::Part& part : step.parts) {
    auto made =
        c10::make_intrusive<c10::TensorImpl>(c10::Storage(memory), part.keys, c10::scalarTypeToTypeMeta(part.dtype));
    made->set_sizes_and_strides(part.sizes, part.strides, part.first);
    slots.made(part.slot) = at::Tensor(std::move(made));
  }
}

void run_step(const Launch& step, Slots& slots, void* stream, at::Device device) {
  c10::SmallVector<uint64_t, 32> words(step.words.begin(), step.words.end());
  c10::SmallVector<void*, 32> pointers(words.size());
  for (size_t i = 0; i < words.size(); ++i) pointers[i] = &words[i];
  for (const Launch::Address& to : step.addresses) words[to.parameter] = address(slots[to.slot], to.offset);
  launch(step.function, step.grid, step.threads, step.shared, stream, pointers.data(), device.index());
}

void run_step(const Call& step, Slots& slots, void*, at::Device) {
  std::vector<c10::IValue> stack;
  stack.reserve(step.arguments.size());
  for (const Argument& argument : step.arguments) stack.push_back(value(slots, argument));
  step.op.callBoxed(&stack);
  size_t at = 0;
  const auto keep = [&](at::Tensor found) {
    const int64_t slot = step.outputs[at++];
    if (slot >= 0) slots.made(slot) = std::move(found);
  };
  for (c10::IValue& output : stack) {
    if (output.isTensor()) {
      keep(std::move(output).toTensor());
    } else if (output.isTensorList()) {
      for (at::Tensor found : output.toTensorVector()) keep(std::move(found));
    }
  }
}

}  // namespace

Program::Program(int64_t inputs, std::vector<at::Tensor> constants, at::Device device)
    : inputs_(inputs), constants_(std::move(constants)), device_(device), last_(inputs + constants_.size(), -1) {}

void Program::uses(int64_t slot) {
  if (slot >= static_cast<int64_t>(last_.size())) last_.resize(slot + 1, -1);
  last_[slot] = static_cast<int64_t>(steps_.size());
}

void Program::add_empty(int64_t slot, std::vector<int64_t> sizes, std::vector<int64_t> strides, at::ScalarType dtype,
                        at::Device device) {
  uses(slot);
  const size_t bytes = at::detail::computeStorageNbytes(sizes, strides, c10::elementSize(dtype));
  // PyTorch may have been given another allocator than its own, and names it nowhere else.
  c10::Allocator* const allocator = at::empty({0}, at::TensorOptions(device)).storage().allocator();
  const c10::DispatchKeySet keys(c10::computeDispatchKey(dtype, at::kStrided, device));
  steps_.emplace_back(Empty{
      {{slot, 0, std::move(sizes), std::move(strides), dtype, keys}}, static_cast<int64_t>(bytes), device, allocator});
}

void Program::add(Launch step) {
  std::vector<Launch::Address> changing;
  for (const Launch::Address& to : step.addresses) {
    uses(to.slot);
    const int64_t constant = to.slot - inputs_;
    if (constant >= 0 && constant < static_cast<int64_t>(constants_.size()))
      step.words[to.parameter] = address(constants_[constant], to.offset);
    else
      changing.push_back(to);
  }
  step.addresses = std::move(changing);
  steps_.emplace_back(std::move(step));
}

void Program::add(Call step) {
  for (const Argument& argument : step.arguments) {
    if (const auto* ref = std::get_if<Ref>(&argument)) uses(ref->slot);
    if (const auto* refs = std::get_if<std::vector<Ref>>(&argument))
      for (const Ref& ref : *refs) uses(ref.slot);
  }
  for (int64_t slot : step.outputs)
    if (slot >= 0) uses(slot);
  steps_.emplace_back(std::move(step));
}

// What is allocated one after the other and let go of after the same step becomes one piece of memory.
void Program::merge() {
  std::vector<Step> steps;
  std::vector<int64_t> now;  // of each step
  for (Step& step : steps_) {
    auto* const added = std::get_if<Empty>(&step);
    auto* const before = added && !steps.empty() ? std::get_if<Empty>(&steps.back()) : nullptr;
    const int64_t end = added ? last_[added->parts[0].slot] : KEPT;
    if (before && end != KEPT && end == last_[before->parts[0].slot] && added->device == before->device) {
      const int64_t first = (before->bytes + ALIGNED - 1) / ALIGNED * ALIGNED;
      added->parts[0].first = first / static_cast<int64_t>(c10::elementSize(added->parts[0].dtype));
      before->parts.push_back(std::move(added->parts[0]));
      before->bytes = first + added->bytes;
    } else {
      steps.push_back(std::move(step));
    }
    now.push_back(static_cast<int64_t>(steps.size()) - 1);
  }
  steps_ = std::move(steps);
  for (int64_t& last : last_)
    if (last >= 0 && last != KEPT) last = now[last];
}

void Program::returns(std::vector<std::optional<Ref>> results) {
  results_ = std::move(results);
  for (const auto& ref : results_)
    if (ref) last_[ref->slot] = KEPT;
  merge();
  letting_.resize(steps_.size());
  for (size_t slot = inputs_ + constants_.size(); slot < last_.size(); ++slot)
    if (last_[slot] >= 0 && last_[slot] != KEPT) letting_[last_[slot]].push_back(static_cast<int64_t>(slot));
}

std::vector<at::Tensor> Program::run(const std::vector<at::Tensor>& inputs) const {
  // Recorded below autograd and autocast, and so run there.
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const c10::DeviceGuard guard(device_);
  void* stream = nullptr;
  if (device_.is_cuda()) stream = handle(c10::impl::VirtualGuardImpl(device_.type()).getStream(device_), 0);
  Slots slots(inputs, constants_, last_.size());
  for (size_t i = 0; i < steps_.size(); ++i) {
    std::visit([&](const auto& step) { run_step(step, slots, stream, device_); }, steps_[i]);
    for (int64_t slot : letting_[i]) slots.made(slot).reset();
  }
  std::vector<at::Tensor> results;
  results.reserve(results_.size());
  for (const auto& ref : results_) results.push_back(ref ? tensor(slots, *ref) : at::Tensor());
  return results;
}

}  // namespace fastpeft

#include "program.h"

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/SmallVector.h>

#include "driver.h"

namespace fastpeft {
namespace {

at::Tensor view(const at::Tensor& base, const Ref& ref) {
  const caffe2::TypeMeta dtype = c10::scalarTypeToTypeMeta(ref.dtype);
  auto impl = c10::make_intrusive<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(),
                                                   dtype);
  const int64_t first = base.storage_offset() * static_cast<int64_t>(base.itemsize()) + ref.offset;
  impl->set_sizes_and_strides(ref.sizes, ref.strides, first / static_cast<int64_t>(dtype.itemsize()));
  return at::Tensor(std::move(impl));
}

at::Tensor tensor(const std::vector<at::Tensor>& slots, const Ref& ref) {
  const at::Tensor& base = slots[ref.slot];
  return ref.whole ? base : view(base, ref);
}

uint64_t address(const std::vector<at::Tensor>& slots, const Ref& ref) {
  const at::Tensor& base = slots[ref.slot];
  return reinterpret_cast<uint64_t>(base.const_data_ptr()) + ref.offset;
}

c10::IValue value(const std::vector<at::Tensor>& slots, const Argument& argument) {
  if (const auto* given = std::get_if<c10::IValue>(&argument)) return *given;
  if (const auto* ref = std::get_if<Ref>(&argument)) return tensor(slots, *ref);
  std::vector<at::Tensor> list;
  for (const Ref& ref : std::get<std::vector<Ref>>(argument)) list.push_back(tensor(slots, ref));
  return c10::List<at::Tensor>(std::move(list));
}

void run_step(const Empty& step, std::vector<at::Tensor>& slots, void*, int) {
  slots[step.slot] = at::empty_strided(step.sizes, step.strides, at::TensorOptions(step.device).dtype(step.dtype));
}

void run_step(const Launch& step, std::vector<at::Tensor>& slots, void* stream, int device) {
  const size_t count = step.parameters.size();
  c10::SmallVector<uint64_t, 64> words(count);
  c10::SmallVector<void*, 64> pointers(count);
  for (size_t i = 0; i < count; ++i) {
    const Parameter& parameter = step.parameters[i];
    words[i] = parameter.ref ? address(slots, *parameter.ref) : parameter.bits;
    pointers[i] = &words[i];
  }
  launch(step.function, step.grid, step.threads, step.shared, stream, pointers.data(), device);
}

void run_step(const Call& step, std::vector<at::Tensor>& slots, void*, int) {
  std::vector<c10::IValue> stack;
  stack.reserve(step.arguments.size());
  for (const Argument& argument : step.arguments) stack.push_back(value(slots, argument));
  step.op.callBoxed(&stack);
  size_t at = 0;
  const auto keep = [&](at::Tensor found) {
    const int64_t slot = step.outputs[at++];
    if (slot >= 0) slots[slot] = std::move(found);
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

void Program::uses(int64_t slot, size_t step) {
  if (slot >= static_cast<int64_t>(last_.size())) last_.resize(slot + 1, -1);
  last_[slot] = static_cast<int64_t>(step);
}

void Program::add(Empty step) {
  uses(step.slot, steps_.size());
  steps_.emplace_back(std::move(step));
}

void Program::add(Launch step) {
  for (const Parameter& parameter : step.parameters)
    if (parameter.ref) uses(parameter.ref->slot, steps_.size());
  steps_.emplace_back(std::move(step));
}

void Program::add(Call step) {
  for (const Argument& argument : step.arguments) {
    if (const auto* ref = std::get_if<Ref>(&argument)) uses(ref->slot, steps_.size());
    if (const auto* refs = std::get_if<std::vector<Ref>>(&argument))
      for (const Ref& ref : *refs) uses(ref.slot, steps_.size());
  }
  for (int64_t slot : step.outputs)
    if (slot >= 0) uses(slot, steps_.size());
  steps_.emplace_back(std::move(step));
}

void Program::returns(std::vector<std::optional<Ref>> results) {
  results_ = std::move(results);
  letting_.resize(steps_.size());
  std::vector<bool> kept(last_.size(), false);
  for (const auto& ref : results_)
    if (ref) kept[ref->slot] = true;
  const size_t own = inputs_ + constants_.size();
  for (size_t slot = own; slot < last_.size(); ++slot)
    if (!kept[slot] && last_[slot] >= 0) letting_[last_[slot]].push_back(static_cast<int64_t>(slot));
}

std::vector<at::Tensor> Program::run(std::vector<at::Tensor> inputs) const {
  // Recorded below autograd and autocast, and so run there.
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const c10::DeviceGuard guard(device_);
  void* stream = nullptr;
  if (device_.is_cuda()) stream = c10::impl::VirtualGuardImpl(device_.type()).getStream(device_).native_handle();
  std::vector<at::Tensor> slots = std::move(inputs);
  slots.insert(slots.end(), constants_.begin(), constants_.end());
  slots.resize(last_.size());
  for (size_t i = 0; i < steps_.size(); ++i) {
    std::visit([&](const auto& step) { run_step(step, slots, stream, device_.index()); }, steps_[i]);
    for (int64_t slot : letting_[i]) slots[slot].reset();
  }
  std::vector<at::Tensor> results;
  results.reserve(results_.size());
  for (const auto& ref : results_) results.push_back(ref ? tensor(slots, *ref) : at::Tensor());
  return results;
}

}  // namespace fastpeft

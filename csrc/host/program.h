// A program: what a call of an op asks of PyTorch and of the device, recorded once and run again on other tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

namespace fastpeft {

// A tensor of a program: a slot's own, or a view of it, perhaps in another dtype. The offset is in bytes from the
// slot's first element.
struct Ref {
  int64_t slot;
  bool whole;
  int64_t offset;
  std::vector<int64_t> sizes, strides;
  at::ScalarType dtype;
};

// Tensors in one piece of memory: those that are allocated one after the other and let go of together.
struct Empty {
  struct Part {
    int64_t slot, first;  // in elements
    std::vector<int64_t> sizes, strides;
    at::ScalarType dtype;
    c10::DispatchKeySet keys;
  };
  std::vector<Part> parts;
  int64_t bytes;
  at::Device device;
  c10::Allocator* allocator;
};

// A kernel with the eight bytes of each parameter. Those of tensors are written anew for each launch.
struct Launch {
  struct Address {
    size_t parameter;
    int64_t slot, offset;
  };
  void* function;
  unsigned grid[3];
  unsigned threads, shared;
  std::vector<uint64_t> words;
  std::vector<Address> addresses;
};

// An operator of PyTorch. Its arguments are values, tensors, or lists of tensors.
using Argument = std::variant<c10::IValue, Ref, std::vector<Ref>>;
struct Call {
  c10::OperatorHandle op;
  std::vector<Argument> arguments;
  std::vector<int64_t> outputs;  // a slot for each output; -1 where it is a tensor that is there already
};

class Program {
 public:
  // The slots up to `inputs` are the arguments of `run`; the constants follow.
  Program(int64_t inputs, std::vector<at::Tensor> constants, at::Device device);

  void add_empty(int64_t slot, std::vector<int64_t> sizes, std::vector<int64_t> strides, at::ScalarType dtype,
                 at::Device device);
  void add(Launch step);
  void add(Call step);
  // To be called once, after the last step: what `run` returns.
  void returns(std::vector<std::optional<Ref>> results);

  // An undefined tensor where there is no result. Needs no lock of Python's.
  std::vector<at::Tensor> run(const std::vector<at::Tensor>& inputs) const;
  int64_t inputs() const { return inputs_; }

 private:
  using Step = std::variant<Empty, Launch, Call>;
  void uses(int64_t slot);
  void merge();

  int64_t inputs_;
  std::vector<at::Tensor> constants_;
  at::Device device_;
  std::vector<Step> steps_;
  std::vector<int64_t> last_;  // of each slot, the step after which it is let go, -1: never used, KEPT: a result
  std::vector<std::vector<int64_t>> letting_;  // after each step
  std::vector<std::optional<Ref>> results_;
};

}  // namespace fastpeft

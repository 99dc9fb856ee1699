// What a call looks like: everything of its arguments and of the thread's state that decides what is to be done.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/python_headers.h>

#include <string>
#include <vector>

namespace fastpeft {

// Whether this thread is outside of everything that only Python's way serves: modes, transforms, tracing.
bool thread_is_plain();
bool autocasts(at::DeviceType type);

class Key {
 public:
  // False where a call has to take the way through Python: tensors of subclasses, modes, transforms, tracing.
  bool add_call(PyObject* const* arguments, Py_ssize_t count);
  // What backward was given: shapes, strides, alignment.
  bool add_tensors(const std::vector<at::Tensor>& tensors);

  const std::string& bytes() const { return bytes_; }
  // The call's tensors in their order, those of lists too.
  std::vector<at::Tensor>& tensors() { return tensors_; }

 private:
  bool begin();
  bool add(PyObject* argument);
  bool add_items(PyObject* const* items, Py_ssize_t count, char mark);
  bool add_tensor(const at::Tensor& tensor);
  void add_number(char mark, const void* bits, size_t size);

  std::string bytes_;
  std::vector<at::Tensor> tensors_;
  std::vector<const void*> addresses_;
  bool grad_mode_ = true, tangents_ = true;
};

}  // namespace fastpeft

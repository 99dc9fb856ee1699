#include "key.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace fastpeft {
namespace {

// Tensors of these kinds, and threads inside of these, are served by Python alone.
const c10::DispatchKeySet OTHERS({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot,
                                  c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper,
                                  c10::DispatchKey::FuncTorchDynamicLayerFrontMode,
                                  c10::DispatchKey::FuncTorchDynamicLayerBackMode, c10::DispatchKey::FuncTorchVmapMode,
                                  c10::DispatchKey::Functionalize, c10::DispatchKey::Conjugate,
                                  c10::DispatchKey::Negative, c10::DispatchKey::ZeroTensor, c10::DispatchKey::Fake});

}  // namespace

bool thread_is_plain() {
  return !c10::impl::dispatch_mode_enabled() && !at::impl::torch_function_mode_enabled() &&
         !torch::jit::tracer::isTracing() && !c10::impl::tls_local_dispatch_key_set().included_.has_any(OTHERS);
}

bool autocasts(at::DeviceType type) {
  return at::autocast::is_autocast_available(type) && at::autocast::is_autocast_enabled(type);
}

void Key::add_number(char mark, const void* bits, size_t size) {
  bytes_.push_back(mark);
  bytes_.append(static_cast<const char*>(bits), size);
}

bool Key::add_tensor(const at::Tensor& tensor) {
  if (!tensor.defined()) {
    bytes_.push_back('u');
    return true;
  }
  if (tensor.layout() != at::kStrided || tensor.is_nested() || tensor.key_set().has_any(OTHERS) || tensor.is_meta() ||
      (tangents_ && tensor._fw_grad(0).defined()))
    return false;
  const auto* address = static_cast<const char*>(tensor.unsafeGetTensorImpl()->data());
  const bool asks = grad_mode_ && tensor.requires_grad();
  const char head[] = {'t',
                       static_cast<char>(tensor.scalar_type()),
                       static_cast<char>(tensor.device().type()),
                       static_cast<char>(tensor.device().index()),
                       static_cast<char>(reinterpret_cast<uintptr_t>(address) % 16 == 0),  // what Triton compiles for
                       static_cast<char>(asks),
                       static_cast<char>(std::find(addresses_.begin(), addresses_.end(), address) - addresses_.begin()),
                       static_cast<char>(tensor.dim())};
  addresses_.push_back(address);
  bytes_.append(head, sizeof head);
  const size_t size = tensor.dim() * sizeof(int64_t);
  bytes_.append(reinterpret_cast<const char*>(tensor.sizes().data()), size);
  bytes_.append(reinterpret_cast<const char*>(tensor.strides().data()), size);
  return true;
}

bool Key::add_items(PyObject* const* items, Py_ssize_t count, char mark) {
  add_number(mark, &count, sizeof count);
  for (Py_ssize_t i = 0; i < count; ++i)
    if (!add(items[i])) return false;
  return true;
}

bool Key::add(PyObject* argument) {
  if (argument == Py_None) {
    bytes_.push_back('n');
    return true;
  }
  if (THPVariable_CheckExact(argument)) {
    tensors_.push_back(THPVariable_Unpack(argument));
    return add_tensor(tensors_.back());
  }
  if (PyFloat_CheckExact(argument)) {
    const double value = PyFloat_AS_DOUBLE(argument);
    add_number('f', &value, sizeof value);
    return true;
  }
  if (PyBool_Check(argument)) {
    bytes_.push_back(argument == Py_True ? 'T' : 'F');
    return true;
  }
  if (PyLong_CheckExact(argument)) {
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(argument, &overflow);
    add_number('i', &value, sizeof value);
    return !overflow;
  }
  if (PyUnicode_CheckExact(argument)) {
    Py_ssize_t length = 0;
    const char* text = PyUnicode_AsUTF8AndSize(argument, &length);
    if (!text) return PyErr_Clear(), false;
    add_number('s', &length, sizeof length);
    bytes_.append(text, length);
    return true;
  }
  if (THPDtype_Check(argument)) {
    const auto dtype = static_cast<int8_t>(reinterpret_cast<THPDtype*>(argument)->scalar_type);
    add_number('d', &dtype, sizeof dtype);
    return true;
  }
  if (PyList_CheckExact(argument))
    return add_items(reinterpret_cast<PyListObject*>(argument)->ob_item, PyList_GET_SIZE(argument), 'l');
  if (PyTuple_Check(argument)) {  // also named ones, which their type tells apart
    const PyTypeObject* type = Py_TYPE(argument);
    add_number('k', &type, sizeof type);
    return add_items(reinterpret_cast<PyTupleObject*>(argument)->ob_item, PyTuple_GET_SIZE(argument), '(');
  }
  return false;
}

bool Key::begin() {
  bytes_.reserve(768);
  addresses_.reserve(16);
  tangents_ = torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
  return thread_is_plain();
}

bool Key::add_call(PyObject* const* arguments, Py_ssize_t count) {
  if (!begin()) return false;
  tensors_.reserve(16);
  grad_mode_ = at::GradMode::is_enabled();
  bytes_.push_back(static_cast<char>(grad_mode_));
  bytes_.push_back(static_cast<char>(c10::InferenceMode::is_enabled()));
  for (const auto type : {at::kCPU, at::kCUDA}) {
    const bool cast = at::autocast::is_autocast_enabled(type);
    bytes_.push_back(cast ? static_cast<char>(at::autocast::get_autocast_dtype(type)) : '\xff');
  }
  const char* backend = std::getenv("FASTPEFT_BACKEND");
  bytes_.append(backend ? backend : "").push_back('\0');
  return add_items(arguments, count, '(');
}

bool Key::add_tensors(const std::vector<at::Tensor>& tensors) {
  if (bytes_.empty() && !begin()) return false;
  grad_mode_ = false;  // whose gradients are asked for is known from the call
  return std::all_of(tensors.begin(), tensors.end(), [this](const at::Tensor& tensor) { return add_tensor(tensor); });
}

}  // namespace fastpeft

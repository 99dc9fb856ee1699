#include "driver.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

namespace fastpeft {
namespace {

// As cuda.h has them; that header is not there where only PyTorch is.
constexpr int INVALID_CONTEXT = 201;
using LaunchKernel = int (*)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                             void**);
using DeviceGet = int (*)(int*, int);
using PrimaryContext = int (*)(void**, int);
using SetContext = int (*)(void*);
using ErrorString = int (*)(int, const char**);

template <class Function>
Function found(const char* name) {
  static void* const library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  void* const symbol = library ? dlsym(library, name) : nullptr;
  if (!symbol) throw std::runtime_error(std::string("fastpeft: CUDA's driver has no ") + name);
  return reinterpret_cast<Function>(symbol);
}

void check(int error, const char* what) {
  if (error == 0) return;
  const char* said = nullptr;
  found<ErrorString>("cuGetErrorString")(error, &said);
  throw std::runtime_error(std::string("fastpeft: ") + what + ": " + (said ? said : "unknown error") + " (" +
                           std::to_string(error) + ")");
}

// A thread that has called no function of the runtime yet has no context, though a device is its current one.
void enter_context(int device) {
  int handle = 0;
  void* context = nullptr;
  check(found<DeviceGet>("cuDeviceGet")(&handle, device), "cuDeviceGet");
  check(found<PrimaryContext>("cuDevicePrimaryCtxRetain")(&context, handle), "cuDevicePrimaryCtxRetain");
  check(found<SetContext>("cuCtxSetCurrent")(context), "cuCtxSetCurrent");
}

}  // namespace

void launch(void* function, const unsigned grid[3], unsigned threads, unsigned shared, void* stream, void** parameters,
            int device) {
  static const auto launch_kernel = found<LaunchKernel>("cuLaunchKernel");
  const auto once = [&] {
    return launch_kernel(function, grid[0], grid[1], grid[2], threads, 1, 1, shared, stream, parameters, nullptr);
  };
  int error = once();
  if (error == INVALID_CONTEXT) {
    enter_context(device);
    error = once();
  }
  check(error, "cuLaunchKernel");
}

}  // namespace fastpeft

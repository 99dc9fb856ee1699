// What every launcher shares: how a failure reaches Python, the two dtypes, and a launch with its attributes.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdarg>
#include <cstdio>

namespace fastpeft {

enum Dtype : int { BF16 = 0, FP16 = 1 };

/// What a launcher returns: 0, or one of these with its words in `error_text`.
enum Error : int { OK = 0, BAD_ARGUMENT = -1, NO_DRIVER_ENTRY = -2, NOT_RESIDENT = -3, CUDA_ERROR = -4 };

inline thread_local char error_text[256] = "";

inline int fail(int code, const char* format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(error_text, sizeof error_text, format, values);
  va_end(values);
  return code;
}

/// 0, or CUDA_ERROR with what was tried and CUDA's own words.
inline int check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return OK;
  cudaGetLastError();  // not left for whoever asks next
  return fail(CUDA_ERROR, "%s: %s (%s)", what, cudaGetErrorName(error), cudaGetErrorString(error));
}

/// Calls `use(T())` with the element type that `dtype` means.
template <class Use>
int with_dtype(int dtype, Use use) {
  if (dtype == BF16) return use(__nv_bfloat16());
  if (dtype == FP16) return use(__half());
  return fail(BAD_ARGUMENT, "dtype is %d, expected 0 (bfloat16) or 1 (float16)", dtype);
}

/// How a kernel is launched: `shared` bytes of dynamic shared memory, clusters of `cluster` blocks (1: none). `early`:
/// may start before the kernel ahead of it in the stream is over (programmatic dependent launch).
struct Launch {
  int grid, threads, shared, cluster = 1;
  bool early = false;
  cudaStream_t stream = nullptr;
};

template <class... Parameters>
int launch(void (*kernel)(Parameters...), const Launch& how, const Parameters&... parameters) {
  const auto allowed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, how.shared);
  if (int failed = check(allowed, "shared memory of a kernel")) return failed;
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(how.grid);
  config.blockDim = dim3(how.threads);
  config.dynamicSmemBytes = how.shared;
  config.stream = how.stream;
  config.attrs = attributes;
  if (how.cluster > 1) {
    auto& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(how.cluster), 1, 1};
  }
  if (how.early) {
    auto& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  return check(cudaLaunchKernelEx(&config, kernel, parameters...), "launch");
}

}  // namespace fastpeft

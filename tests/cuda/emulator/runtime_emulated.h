// The few calls of the CUDA runtime that launchers make, so that they too run as they stand.
#pragma once
#include <set>

#include "ptx_emulated.h"

namespace emulator {

constexpr size_t SHARED_LIMIT = 232448;  // of one block on sm_90
inline std::string last_error = "no error";
inline unsigned last_grid = 0;  // blocks of the last launch

inline cudaError_t failed(cudaError_t code, const std::string& why) {
  last_error = why;
  return code;
}
inline const char* error_string(cudaError_t) { return last_error.c_str(); }
inline cudaError_t get_last_error() { return cudaSuccess; }
/// Device n is the one that says it holds n clusters: launchers may remember what a device told them.
inline cudaError_t get_device(int* device) { return *device = settings.clusters, cudaSuccess; }

/// Contexts: null is none, else that of device n - 1. Which devices have one, and which is the thread's.
inline std::set<uintptr_t> contexts;
inline uintptr_t context = 0;

inline cudaError_t set_device(int device) { return contexts.insert(context = device + 1), cudaSuccess; }
inline CUresult get_context(CUcontext* current) {
  return *current = reinterpret_cast<CUcontext>(context), CUDA_SUCCESS;
}
inline CUresult set_context(CUcontext wanted) { return context = reinterpret_cast<uintptr_t>(wanted), CUDA_SUCCESS; }

template <class Kernel>
cudaError_t set_attribute(Kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && size_t(value) > SHARED_LIMIT)
    return failed(cudaErrorInvalidValue, "more shared memory than a block may have");
  return cudaSuccess;
}

inline uint32_t cluster_of(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) return config.attrs[i].val.clusterDim.x;
  return 1;
}

template <class Kernel>
cudaError_t max_active_clusters(int* clusters, Kernel, const cudaLaunchConfig_t*) {
  return *clusters = settings.clusters, cudaSuccess;
}

template <class... Parameters, class... Args>
cudaError_t launch_kernel(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Args&&... args) {
  if (config->dynamicSmemBytes > SHARED_LIMIT || config->blockDim.y != 1 || config->blockDim.z != 1)
    return failed(cudaErrorInvalidConfiguration, "blocks that the emulator does not launch");
  try {
    last_grid = config->gridDim.x;
    const Index blocks = {config->gridDim.x, config->gridDim.y, config->gridDim.z};
    run_grid(kernel, blocks, cluster_of(*config), config->blockDim.x, config->dynamicSmemBytes, Parameters(args)...);
  } catch (const Fault& fault) {
    return failed(cudaErrorLaunchFailure, fault.what());
  }
  return cudaSuccess;
}

/// cuTensorMapEncodeTiled, for what TMA can do with two-dimensional maps of 16-bit elements and 128-byte swizzle.
inline CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                             const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                             const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                             CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const bool half = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const bool plain = half && rank == 2 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && steps[0] == 1 && steps[1] == 1;
  const bool placed = base && reinterpret_cast<uintptr_t>(base) % 16 == 0 && strides[0] % 16 == 0 &&
                      strides[0] < 1ull << 40 && strides[0] >= sizes[0] * 2;
  const bool sized = sizes[0] && sizes[1] && sizes[0] <= 1ull << 32 && sizes[1] <= 1ull << 32;
  const bool boxed = box[0] && box[1] && box[0] * 2 <= 128 && box[0] * 2 % 16 == 0 && box[1] <= 256;
  if (!plain || !placed || !sized || !boxed || swizzle != CU_TENSOR_MAP_SWIZZLE_128B ||
      fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
    return CUDA_ERROR_INVALID_VALUE;
  const TensorMap m = {static_cast<uint8_t*>(base), sizes[0], sizes[1], strides[0], box[0], box[1]};
  memcpy(map, &m, sizeof m);
  return CUDA_SUCCESS;
}

inline cudaError_t entry_point(const char* name, void** function, unsigned, unsigned long long,
                               cudaDriverEntryPointQueryResult* result) {
  static const std::map<std::string, void*> known = {
      {"cuTensorMapEncodeTiled", reinterpret_cast<void*>(encode_tiled)},
      {"cuCtxGetCurrent", reinterpret_cast<void*>(get_context)},
      {"cuCtxSetCurrent", reinterpret_cast<void*>(set_context)},
  };
  const auto found = known.find(name);
  *function = found == known.end() ? nullptr : found->second;
  *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

}  // namespace emulator

#define cudaLaunchKernelEx               emulator::launch_kernel
#define cudaFuncSetAttribute             emulator::set_attribute
#define cudaOccupancyMaxActiveClusters   emulator::max_active_clusters
#define cudaGetDriverEntryPointByVersion emulator::entry_point
#define cudaGetDevice                    emulator::get_device
#define cudaSetDevice                    emulator::set_device
#define cudaGetLastError                 emulator::get_last_error
#define cudaGetErrorName                 emulator::error_string
#define cudaGetErrorString               emulator::error_string

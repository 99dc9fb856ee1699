// The device, its kernels and their launches.
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"

// ---- device

API cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
API cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
API cudaError_t cudaSetDevice(int device) { return device ? nullgpu_remember(cudaErrorInvalidDevice) : cudaSuccess; }
API cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr attribute, int device) {
  *value = nullgpu_attribute(attribute);
  return cudaSuccess;
}

API cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "null GPU (shape of an H100)");
  p->totalGlobalMem = nullgpu_memory();
  p->sharedMemPerBlock = nullgpu_attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  p->regsPerBlock = nullgpu_attribute(cudaDevAttrMaxRegistersPerBlock);
  p->warpSize = nullgpu_attribute(cudaDevAttrWarpSize);
  p->maxThreadsPerBlock = nullgpu_attribute(cudaDevAttrMaxThreadsPerBlock);
  for (int i = 0; i < 3; i++) {
    p->maxThreadsDim[i] = nullgpu_attribute(cudaDevAttrMaxBlockDimX + i);
    p->maxGridSize[i] = nullgpu_attribute(cudaDevAttrMaxGridDimX + i);
  }
  p->totalConstMem = nullgpu_attribute(cudaDevAttrTotalConstantMemory);
  p->major = nullgpu_attribute(cudaDevAttrComputeCapabilityMajor);
  p->minor = nullgpu_attribute(cudaDevAttrComputeCapabilityMinor);
  p->textureAlignment = nullgpu_attribute(cudaDevAttrTextureAlignment);
  p->multiProcessorCount = nullgpu_attribute(cudaDevAttrMultiProcessorCount);
  p->canMapHostMemory = p->concurrentKernels = p->unifiedAddressing = p->managedMemory = p->cooperativeLaunch = 1;
  p->streamPrioritiesSupported = p->clusterLaunch = 1;
  p->asyncEngineCount = nullgpu_attribute(cudaDevAttrAsyncEngineCount);
  p->memoryBusWidth = nullgpu_attribute(cudaDevAttrGlobalMemoryBusWidth);
  p->l2CacheSize = nullgpu_attribute(cudaDevAttrL2CacheSize);
  p->maxThreadsPerMultiProcessor = nullgpu_attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  p->sharedMemPerMultiprocessor = nullgpu_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  p->regsPerMultiprocessor = nullgpu_attribute(cudaDevAttrMaxRegistersPerMultiprocessor);
  p->sharedMemPerBlockOptin = nullgpu_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  p->maxBlocksPerMultiProcessor = nullgpu_attribute(cudaDevAttrMaxBlocksPerMultiprocessor);
  p->reservedSharedMemPerBlock = nullgpu_attribute(cudaDevAttrReservedSharedMemoryPerBlock);
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetPCIBusId(char* text, int bytes, int device) {
  snprintf(text, bytes, "0000:00:00.0");
  return cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int* can, int i, int j) {
  *can = 0;
  return cudaSuccess;
}
API cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
API cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
API cudaError_t cudaDeviceReset(void) { return cudaSuccess; }
API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** pointer, unsigned version,
                                                 unsigned long long flags,
                                                 enum cudaDriverEntryPointQueryResult* result) {
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY);
  *pointer = driver ? dlsym(driver, name) : NULL;
  if (result) *result = *pointer ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// ---- kernels: a handle is the address of the host's stub

API void** __cudaRegisterFatBinary(void* binary) { return malloc(sizeof(void*)); }
API void __cudaRegisterFatBinaryEnd(void** handle) {}
API void __cudaUnregisterFatBinary(void** handle) { free(handle); }
API void __cudaRegisterFunction(void** handle, const char* host, char* device, const char* name, int limit, void* tid,
                                void* bid, void* block, void* grid, int* size) {}
API void __cudaRegisterVar(void** handle, char* host, char* device, const char* name, int external, size_t bytes,
                           int constant, int global) {}
API void __cudaInitModule(void** handle) {}

API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = (cudaKernel_t)function;
  return cudaSuccess;
}
API cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* found, const void* function) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->numRegs = 64;
  found->binaryVersion = found->ptxVersion = 90;
  found->maxDynamicSharedSizeBytes = nullgpu_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void* function, enum cudaFuncAttribute attribute, int value) {
  return cudaSuccess;
}
API cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t kernel, enum cudaFuncAttribute attribute, int value,
                                                int device) {
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function, int threads,
                                                                       size_t shared, unsigned flags) {
  *blocks = 2;
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* function,
                                               const cudaLaunchConfig_t* configuration) {
  *clusters = nullgpu_attribute(cudaDevAttrMultiProcessorCount);
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads,
                                                              size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}

// ---- launches

// The compiler's stubs push what <<<>>> was given and pop it again around cudaLaunchKernel.
static __thread struct {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
} pushed[16];
static __thread unsigned depth;

API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
  if (depth == sizeof pushed / sizeof *pushed) return 1;
  pushed[depth].grid = grid, pushed[depth].block = block;
  pushed[depth].shared = shared, pushed[depth].stream = stream;
  depth++;
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (!depth) return cudaErrorMissingConfiguration;
  depth--;
  *grid = pushed[depth].grid, *block = pushed[depth].block;
  *shared = pushed[depth].shared, *(cudaStream_t*)stream = pushed[depth].stream;
  return cudaSuccess;
}

API cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                                 cudaStream_t stream) {
  return nullgpu_launch(stream);
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                                   cudaStream_t stream) {
  return nullgpu_launch(stream);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* configuration, const void* function, void** arguments) {
  return nullgpu_launch(configuration->stream);
}
API cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                                            size_t shared, cudaStream_t stream) {
  return nullgpu_launch(stream);
}

// Counters, errors, and the shape of the device.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"

struct counters nullgpu;

void nullgpu_add(long* counter, long n) { __atomic_fetch_add(counter, n, __ATOMIC_RELAXED); }

int nullgpu_missing(const char* function) {
  nullgpu_add(&nullgpu.missing, 1);
  if (getenv("NULLGPU_TRACE")) fprintf(stderr, "nullgpu: %s is not implemented\n", function);
  return cudaErrorNotSupported;
}

static __thread cudaError_t last;

cudaError_t nullgpu_remember(cudaError_t error) {
  if (error) last = error;
  return error;
}

API cudaError_t cudaPeekAtLastError(void) { return last; }

API cudaError_t cudaGetLastError(void) {
  cudaError_t error = last;
  last = cudaSuccess;
  return error;
}

static const struct {
  cudaError_t error;
  const char *name, *words;
} errors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "not implemented by the null GPU"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
    {cudaErrorStreamCaptureUnjoined, "cudaErrorStreamCaptureUnjoined", "capturing stream has unjoined work"},
    {cudaErrorStreamCaptureIsolation, "cudaErrorStreamCaptureIsolation",
     "dependency created on uncaptured work in another stream"},
    {cudaErrorStreamCaptureWrongThread, "cudaErrorStreamCaptureWrongThread",
     "attempt to terminate a thread-local capture sequence from another thread"},
    {cudaErrorCapturedEvent, "cudaErrorCapturedEvent",
     "operation not permitted on an event last recorded in a capturing stream"},
    {cudaErrorIllegalState, "cudaErrorIllegalState", "the operation cannot be performed in the present state"},
};

static size_t index_of(cudaError_t error) {
  size_t i = sizeof errors / sizeof *errors;
  while (i-- > 1)
    if (errors[i].error == error) return i;
  return error ? 1 : 0;
}

API const char* cudaGetErrorName(cudaError_t error) { return errors[index_of(error)].name; }
API const char* cudaGetErrorString(cudaError_t error) { return errors[index_of(error)].words; }

size_t nullgpu_memory(void) {
  const char* gib = getenv("NULLGPU_GIB");
  return (size_t)(gib ? atoll(gib) : 80) << 30;
}

int nullgpu_attribute(int attribute) {
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
      return 1024;
    case cudaDevAttrMaxBlockDimZ:
      return 64;
    case cudaDevAttrMaxGridDimX:
      return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return 48 << 10;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return 227 << 10;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return 228 << 10;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      return 1 << 10;
    case cudaDevAttrTotalConstantMemory:
      return 64 << 10;
    case cudaDevAttrWarpSize:
      return 32;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      return 65536;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return 2048;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      return 32;
    case cudaDevAttrMultiProcessorCount:
      return 132;
    case cudaDevAttrComputeCapabilityMajor:
      return 9;
    case cudaDevAttrComputeCapabilityMinor:
      return 0;
    case cudaDevAttrL2CacheSize:
      return 50 << 20;
    case cudaDevAttrClockRate:
      return 1980000;  // kHz
    case cudaDevAttrMemoryClockRate:
      return 2619000;  // kHz
    case cudaDevAttrGlobalMemoryBusWidth:
      return 5120;  // bits
    case cudaDevAttrTextureAlignment:
      return 512;
    case cudaDevAttrAsyncEngineCount:
      return 3;
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrManagedMemory:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrStreamPrioritiesSupported:
    case cudaDevAttrCanMapHostMemory:
    case cudaDevAttrComputePreemptionSupported:
    case cudaDevAttrClusterLaunch:
      return 1;
    default:
      return 0;  // no memory pools, no NUMA, no multicast
  }
}

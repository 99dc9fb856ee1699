// libcuda.so.1: what Triton and PyTorch ask of the driver itself. A CUstream is the runtime's stream.
#include <cuda.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"

API CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
API CUresult cuDriverGetVersion(int* version) { return (*version = CUDA_VERSION, CUDA_SUCCESS); }
API CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = cudaGetErrorString((cudaError_t)error);
  return CUDA_SUCCESS;
}
API CUresult cuGetErrorName(CUresult error, const char** text) {
  *text = cudaGetErrorName((cudaError_t)error);
  return CUDA_SUCCESS;
}

API CUresult cuLogsRegisterCallback(CUlogsCallback callback, void* data, CUlogsCallbackHandle* handle) {
  return CUDA_SUCCESS;  // there is nothing to log
}
API CUresult cuLogsUnregisterCallback(CUlogsCallbackHandle handle) { return CUDA_SUCCESS; }

// ---- device and context: there is one of each

static const CUcontext context = (CUcontext)16;

API CUresult cuDeviceGetCount(int* count) { return (*count = 1, CUDA_SUCCESS); }
API CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  return (*device = 0, ordinal ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS);
}
API CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  *value = nullgpu_attribute(attribute);
  return CUDA_SUCCESS;
}
API CUresult cuDeviceGetName(char* name, int bytes, CUdevice device) {
  strncpy(name, "null GPU", bytes);
  return CUDA_SUCCESS;
}
API CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) { return (memset(uuid, 0, sizeof *uuid), CUDA_SUCCESS); }
API CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice device) { return (*bytes = nullgpu_memory(), CUDA_SUCCESS); }
API CUresult cuDevicePrimaryCtxRetain(CUcontext* found, CUdevice device) { return (*found = context, CUDA_SUCCESS); }
API CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
  *flags = 0, *active = 1;
  return CUDA_SUCCESS;
}
API CUresult cuCtxGetCurrent(CUcontext* found) { return (*found = context, CUDA_SUCCESS); }
API CUresult cuCtxSetCurrent(CUcontext given) { return CUDA_SUCCESS; }
API CUresult cuCtxGetDevice(CUdevice* device) { return (*device = 0, CUDA_SUCCESS); }
API CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { return (*value = 0, CUDA_SUCCESS); }
API CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
API CUresult cuCtxSynchronize(void) { return (CUresult)nullgpu_wait_for_all(); }

// ---- modules and launches

API CUresult cuModuleLoadData(CUmodule* module, const void* image) { return (*module = malloc(1), CUDA_SUCCESS); }
API CUresult cuModuleLoad(CUmodule* module, const char* path) { return cuModuleLoadData(module, path); }
API CUresult cuModuleUnload(CUmodule module) { return (free(module), CUDA_SUCCESS); }
API CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = (CUfunction)module;
  return CUDA_SUCCESS;
}
API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
API CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
API CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache configuration) { return CUDA_SUCCESS; }
API CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction function, const CUlaunchConfig* configuration) {
  *clusters = nullgpu_attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
  return CUDA_SUCCESS;
}
API CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                            unsigned bz, unsigned shared, CUstream stream, void** arguments, void** extra) {
  return (CUresult)nullgpu_launch(stream);
}
API CUresult cuLaunchKernelEx(const CUlaunchConfig* configuration, CUfunction function, void** arguments,
                              void** extra) {
  return (CUresult)nullgpu_launch(configuration->hStream);
}
API CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                                       unsigned by, unsigned bz, unsigned shared, CUstream stream, void** arguments) {
  return (CUresult)nullgpu_launch(stream);
}
API CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* pointer,
                                    const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                    const cuuint32_t* steps, CUtensorMapInterleave interleave,
                                    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                    CUtensorMapFloatOOBfill fill) {
  return (memset(map, 0, sizeof *map), CUDA_SUCCESS);  // only a kernel would read it
}

// ---- pointers and streams

API CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
      return (*(CUdeviceptr*)value = pointer, CUDA_SUCCESS);
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      *(unsigned*)value = nullgpu_place((void*)pointer) == DEVICE ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
      return CUDA_SUCCESS;
    default:
      return (CUresult)nullgpu_missing("cuPointerGetAttribute of another attribute");
  }
}
API CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute* attributes, void** values,
                                    CUdeviceptr pointer) {
  CUresult error = CUDA_SUCCESS;
  for (unsigned i = 0; i < count && !error; i++) error = cuPointerGetAttribute(values[i], attributes[i], pointer);
  return error;
}
API CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  return (CUresult)cudaStreamIsCapturing(stream, (enum cudaStreamCaptureStatus*)status);
}
API CUresult cuStreamSynchronize(CUstream stream) { return (CUresult)cudaStreamSynchronize(stream); }
API CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
  return (CUresult)cudaStreamWaitEvent(stream, event, flags);
}
API CUresult cuEventRecord(CUevent event, CUstream stream) { return (CUresult)cudaEventRecord(event, stream); }

// What the four libraries share: the counters, the device's shape, its memory, its streams and captures.
// All of it lives in libcudart.so.13; the others link to that.
#pragma once

#include <cuda_runtime_api.h>
#include <stddef.h>

#define API __attribute__((visibility("default")))

// bench/nullgpu/__init__.py reads this struct by name: the order of fields is theirs too.
struct counters {
  long launches;        // kernels, products of cuBLAS, fills: what the host puts into a stream, copies apart
  long copies;          // of any kind
  long syncs;           // calls in which the host waits for the device
  long pageable;        // copies between the device and host memory that is not pinned
  long graph_launches;  // replays
  long refused;         // calls that are forbidden while a stream is captured
  long stray;           // launches and copies outside of a capture while one was under way: a replay lacks them
  long missing;         // calls of functions that are not implemented here
  long allocations, frees;
  long bytes, peak;  // of device memory
};
extern API struct counters nullgpu;

void nullgpu_add(long* counter, long n);
API int nullgpu_missing(const char* function);  // counts, tells under NULLGPU_TRACE, gives cudaErrorNotSupported

// The device's shape is an H100's; cudaDeviceAttr and CUdevice_attribute are the same numbers.
API int nullgpu_attribute(int attribute);
API size_t nullgpu_memory(void);  // bytes: NULLGPU_GIB, or 80 GiB

// Memory. Device memory is host memory that nobody touches but copies and small fills.
enum place { PAGEABLE, PINNED, DEVICE };
API cudaError_t nullgpu_allocate(void** pointer, size_t bytes, enum place place);
API cudaError_t nullgpu_free(void* pointer);
API extern int nullgpu_reads_zero;  // whether the host reads zeros from the device, not what lies there
API enum place nullgpu_place(const void* pointer);

// Streams. Both are 0 where nothing is wrong, or the error that the call must return.
API cudaError_t nullgpu_enqueue(cudaStream_t stream);  // a stream gets work: called for every launch and copy
API cudaError_t nullgpu_launch(cudaStream_t stream);   // the same, counted as a launch
cudaError_t nullgpu_unsafe(void);                      // a call that may disturb captures, such as cudaMalloc
cudaError_t nullgpu_refuse(cudaStream_t stream);       // a call that no capture of this stream can hold
API cudaError_t nullgpu_wait_for_all(void);            // the host waits for the device

cudaError_t nullgpu_remember(cudaError_t error);  // cudaGetLastError gives it

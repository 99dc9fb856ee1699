// Memory, copies and fills.
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#include "device.h"

#define GRANULE ((size_t)2 << 20)  // a real driver hands out device memory in pages of 2 MiB
#define ENTRIES (1 << 16)

static struct {
  char* start;
  size_t bytes;
  enum place place;
  int own;  // mapped here, not registered
} blocks[ENTRIES];
static int used;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int find(const void* pointer) {
  for (int i = 0; i < used; i++)
    if (blocks[i].start && (uintptr_t)pointer - (uintptr_t)blocks[i].start < blocks[i].bytes) return i;
  return -1;
}

static cudaError_t add(void* start, size_t bytes, enum place place, int own) {
  pthread_mutex_lock(&lock);
  int i = 0;
  while (i < used && blocks[i].start) i++;
  cudaError_t error = i == ENTRIES ? cudaErrorMemoryAllocation : cudaSuccess;
  if (!error) {
    if (i == used) used++;
    blocks[i].start = start, blocks[i].bytes = bytes, blocks[i].place = place, blocks[i].own = own;
  }
  pthread_mutex_unlock(&lock);
  return nullgpu_remember(error);
}

enum place nullgpu_place(const void* pointer) {
  pthread_mutex_lock(&lock);
  int i = find(pointer);
  enum place place = i < 0 ? PAGEABLE : blocks[i].place;
  pthread_mutex_unlock(&lock);
  return place;
}

static cudaError_t reserve(long bytes) {
  if (bytes > 0 && (size_t)(nullgpu.bytes + bytes) > nullgpu_memory())
    return nullgpu_remember(cudaErrorMemoryAllocation);
  nullgpu_add(bytes < 0 ? &nullgpu.frees : &nullgpu.allocations, 1);
  nullgpu_add(&nullgpu.bytes, bytes);
  if (nullgpu.bytes > nullgpu.peak) nullgpu.peak = nullgpu.bytes;
  return cudaSuccess;
}

cudaError_t nullgpu_allocate(void** pointer, size_t bytes, enum place place) {
  *pointer = NULL;
  if (!bytes) return cudaSuccess;
  bytes = (bytes + GRANULE - 1) / GRANULE * GRANULE;
  if (place == DEVICE) {
    cudaError_t error = reserve(bytes);
    if (error) return error;
  }
  void* start = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED || add(start, bytes, place, 1)) {
    if (place == DEVICE) reserve(-(long)bytes);
    return nullgpu_remember(cudaErrorMemoryAllocation);
  }
  *pointer = start;
  return cudaSuccess;
}

cudaError_t nullgpu_free(void* pointer) {
  if (!pointer) return cudaSuccess;
  pthread_mutex_lock(&lock);
  int i = find(pointer);
  cudaError_t error = i < 0 || blocks[i].start != pointer ? cudaErrorInvalidValue : cudaSuccess;
  if (!error) {
    if (blocks[i].own) munmap(blocks[i].start, blocks[i].bytes);
    if (blocks[i].place == DEVICE) reserve(-(long)blocks[i].bytes);
    blocks[i].start = NULL;
  }
  pthread_mutex_unlock(&lock);
  return nullgpu_remember(error);
}

API cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  cudaError_t error = nullgpu_unsafe();
  return error ? error : nullgpu_allocate(pointer, bytes, DEVICE);
}
API cudaError_t cudaFree(void* pointer) {
  cudaError_t error = pointer ? nullgpu_unsafe() : cudaSuccess;
  return error ? error : nullgpu_free(pointer);
}
API cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned flags) {
  cudaError_t error = nullgpu_unsafe();
  return error ? error : nullgpu_allocate(pointer, bytes, PINNED);
}
API cudaError_t cudaMallocHost(void** pointer, size_t bytes) { return cudaHostAlloc(pointer, bytes, 0); }
API cudaError_t cudaFreeHost(void* pointer) { return cudaFree(pointer); }
API cudaError_t cudaHostRegister(void* pointer, size_t bytes, unsigned flags) { return add(pointer, bytes, PINNED, 0); }
API cudaError_t cudaHostUnregister(void* pointer) { return nullgpu_free(pointer); }
API cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned flags) {
  *device = host;
  return cudaSuccess;
}

API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *total = nullgpu_memory();
  *free = *total - nullgpu.bytes;
  return cudaSuccess;
}

API cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* found, const void* pointer) {
  enum place place = nullgpu_place(pointer);
  memset(found, 0, sizeof *found);
  found->type = place == DEVICE   ? cudaMemoryTypeDevice
                : place == PINNED ? cudaMemoryTypeHost
                                  : cudaMemoryTypeUnregistered;
  found->devicePointer = place == PAGEABLE ? NULL : (void*)pointer;
  found->hostPointer = place == DEVICE ? NULL : (void*)pointer;
  return cudaSuccess;
}

int nullgpu_reads_zero;

// Values cross between host and device as they do on a real one. A copy within the device is a kernel's work, and would
// make pages of memory that nobody touched.
static cudaError_t copy(void* to, const void* from, size_t bytes, cudaStream_t stream, int waits) {
  enum place target = nullgpu_place(to), source = nullgpu_place(from);
  int crosses = target != source && (target == DEVICE || source == DEVICE);
  int pageable = crosses && (target == PAGEABLE || source == PAGEABLE);
  cudaError_t error = cudaSuccess;
  if (waits && crosses)
    error = nullgpu_unsafe();
  else if (pageable)
    error = nullgpu_refuse(stream);  // a replay would read host memory that is gone by then
  if (!error) error = nullgpu_enqueue(stream);
  if (error) return error;
  nullgpu_add(&nullgpu.copies, 1);
  nullgpu_add(&nullgpu.pageable, pageable);
  // To pageable memory even an asynchronous copy returns only when it is done.
  nullgpu_add(&nullgpu.syncs, (waits && crosses) || (pageable && target == PAGEABLE));
  if (crosses && source == DEVICE && nullgpu_reads_zero)
    memset(to, 0, bytes);
  else if (crosses || target != DEVICE)
    memmove(to, from, bytes);
  return cudaSuccess;
}

API cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind) {
  return copy(to, from, bytes, NULL, 1);
}
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind,
                                cudaStream_t stream) {
  return copy(to, from, bytes, stream, 0);
}
API cudaError_t cudaMemcpyPeerAsync(void* to, int i, const void* from, int j, size_t bytes, cudaStream_t stream) {
  return copy(to, from, bytes, stream, 0);
}
API cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                                  size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
  cudaError_t error = copy(to, from, height ? width : 0, stream, 0);
  for (size_t row = 1; !error && row < height && nullgpu_place(to) != nullgpu_place(from); row++)
    memmove((char*)to + row * to_pitch, (const char*)from + row * from_pitch, width);
  return error;
}
API cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset,
                                   enum cudaMemcpyKind kind) {
  nullgpu_add(&nullgpu.copies, 1);
  nullgpu_add(&nullgpu.pageable, nullgpu_place(from) == PAGEABLE);
  nullgpu_add(&nullgpu.syncs, 1);
  return nullgpu_unsafe();
}

API cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t stream) {
  cudaError_t error = nullgpu_launch(stream);
  if (!error && bytes < GRANULE) memset(pointer, value, bytes);
  return error;
}
API cudaError_t cudaMemset(void* pointer, int value, size_t bytes) {
  return cudaMemsetAsync(pointer, value, bytes, NULL);
}

static char symbols[1 << 20];
API cudaError_t cudaGetSymbolAddress(void** pointer, const void* symbol) {
  *pointer = symbols;
  return cudaSuccess;
}

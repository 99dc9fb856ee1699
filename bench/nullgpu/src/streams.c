// Streams and events. Work is done when it is enqueued, so a wait never waits.
#include "streams.h"

#include <stdlib.h>
#include <time.h>

static struct CUstream_st legacy;  // streams 0, cudaStreamLegacy and cudaStreamPerThread
cudaStream_t streams = &legacy;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

cudaStream_t stream_of(cudaStream_t stream) { return (size_t)stream <= 2 ? &legacy : stream; }

cudaError_t nullgpu_enqueue(cudaStream_t handle) {
  cudaStream_t stream = stream_of(handle);
  stream->work++;
  if (!under_way) return cudaSuccess;
  if (!stream->capture) {
    nullgpu_add(&nullgpu.stray, 1);
    return cudaSuccess;
  }
  if (stream->capture->error) return nullgpu_remember(cudaErrorStreamCaptureInvalidated);
  stream->capture->graph->launches++;
  stream->unjoined = stream != stream->capture->origin;
  return cudaSuccess;
}

cudaError_t nullgpu_launch(cudaStream_t stream) {
  nullgpu_add(&nullgpu.launches, 1);
  return nullgpu_enqueue(stream);
}

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  *stream = calloc(1, sizeof **stream);
  (*stream)->priority = priority;
  pthread_mutex_lock(&lock);
  (*stream)->next = streams;
  streams = *stream;
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
API cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
API cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaSuccess; }  // a handle in use elsewhere stays valid
API cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  *priority = stream_of(stream)->priority;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0, *greatest = -5;
  return cudaSuccess;
}
API cudaError_t cudaStreamQuery(cudaStream_t stream) {
  cudaError_t error = nullgpu_refuse(stream);
  return error ? error : nullgpu_unsafe();
}
API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  nullgpu_add(&nullgpu.syncs, 1);
  return cudaStreamQuery(stream);
}
API cudaError_t cudaDeviceSynchronize(void) { return nullgpu_wait_for_all(); }
API cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  cudaError_t error = nullgpu_enqueue(stream);
  if (!error && !stream_of(stream)->capture) function(data);
  return error;
}
API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void* data, unsigned flags) {
  cudaError_t error = nullgpu_refuse(stream);
  if (!error) callback(stream, cudaSuccess, data);
  return error;
}

// ---- events

static double now_ms(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1e3 + now.tv_nsec * 1e-6;
}

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  *event = calloc(1, sizeof **event);
  return cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t event) {
  free(event);
  return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t handle, unsigned flags) {
  cudaStream_t stream = stream_of(handle);
  int captured = stream->capture && !(flags & cudaEventRecordExternal);
  event->ms = now_ms(), event->stream = stream, event->work = stream->work;
  event->id = captured ? stream->capture->id : 0;
  return cudaSuccess;
}
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}

API cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned flags) {
  cudaStream_t stream = stream_of(handle);
  struct capture* capture = capture_of(event);
  if (!event->stream || flags & cudaEventWaitExternal) return cudaSuccess;
  if (stream->capture && stream->capture != capture)
    return invalidate(stream->capture, cudaErrorStreamCaptureIsolation);
  if (capture) {
    stream->capture = capture;
    if (event->stream != stream && event->work == event->stream->work) event->stream->unjoined = 0;
    stream->unjoined = stream != capture->origin;
  }
  return cudaSuccess;
}
API cudaError_t cudaEventQuery(cudaEvent_t event) {
  struct capture* capture = capture_of(event);
  return capture ? invalidate(capture, cudaErrorCapturedEvent) : nullgpu_unsafe();
}
API cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  nullgpu_add(&nullgpu.syncs, 1);
  return cudaEventQuery(event);
}
API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
  *ms = end->ms - start->ms;  // on the host's clock
  return cudaSuccess;
}

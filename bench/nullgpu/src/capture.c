// The rules of stream capture: CUDA's programming guide, "Creating a Graph Using Stream Capture", and
// cudaThreadExchangeStreamCaptureMode.
#include <execinfo.h>
#include <stdio.h>
#include <stdlib.h>

#include "streams.h"

struct capture captures[MOST];
int under_way;
static unsigned long long ids;
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

static void trace(void) {
  if (!getenv("NULLGPU_TRACE")) return;
  void* frames[32];
  fprintf(stderr, "nullgpu: forbidden while a stream is captured:\n");
  backtrace_symbols_fd(frames, backtrace(frames, 32), 2);
}

cudaError_t invalidate(struct capture* capture, cudaError_t error) {
  trace();
  nullgpu_add(&nullgpu.refused, 1);
  if (capture && !capture->error) capture->error = error;
  return nullgpu_remember(error);
}

cudaError_t nullgpu_refuse(cudaStream_t stream) {
  struct capture* capture = stream_of(stream)->capture;
  return capture ? invalidate(capture, cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

cudaError_t nullgpu_unsafe(void) {
  if (!under_way || thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  for (struct capture* c = captures; c < captures + MOST; c++) {
    if (!c->origin || c->mode == cudaStreamCaptureModeRelaxed) continue;
    int mine = pthread_equal(c->thread, pthread_self());
    if (mine || (thread_mode == cudaStreamCaptureModeGlobal && c->mode == cudaStreamCaptureModeGlobal))
      return invalidate(c, cudaErrorStreamCaptureUnsupported);
  }
  return cudaSuccess;
}

cudaError_t nullgpu_wait_for_all(void) {
  nullgpu_add(&nullgpu.syncs, 1);
  for (struct capture* c = captures; under_way && c < captures + MOST; c++)
    if (c->origin) return invalidate(c, cudaErrorStreamCaptureUnsupported);
  return cudaSuccess;
}

struct capture* capture_of(cudaEvent_t event) {
  for (struct capture* c = captures; event->id && c < captures + MOST; c++)
    if (c->origin && c->id == event->id) return c;
  return NULL;
}

API cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode* mode) {
  enum cudaStreamCaptureMode old = thread_mode;
  thread_mode = *mode;
  *mode = old;
  return cudaSuccess;
}

static cudaError_t begin(cudaStream_t stream, cudaGraph_t graph, enum cudaStreamCaptureMode mode) {
  struct capture* c = captures;
  while (c < captures + MOST && c->origin) c++;
  if (stream_of(stream) == stream_of(NULL) || c == captures + MOST)
    return nullgpu_remember(cudaErrorStreamCaptureUnsupported);
  if (stream->capture) return nullgpu_remember(cudaErrorIllegalState);
  *c = (struct capture){stream, mode, pthread_self(), ++ids, cudaSuccess, graph};
  stream->capture = c;
  under_way++;
  return cudaSuccess;
}
API cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned flags) {
  *graph = calloc(1, sizeof **graph);
  return cudaSuccess;
}
API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  cudaGraph_t graph;
  cudaGraphCreate(&graph, 0);
  return begin(stream, graph, mode);
}
API cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t stream, cudaGraph_t graph, const cudaGraphNode_t* nodes,
                                              const cudaGraphEdgeData* edges, size_t count,
                                              enum cudaStreamCaptureMode mode) {
  return begin(stream, graph, mode);
}

API cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  struct capture* capture = stream_of(stream)->capture;
  *graph = NULL;
  if (!capture || capture->origin != stream) return nullgpu_remember(cudaErrorIllegalState);
  if (capture->mode != cudaStreamCaptureModeRelaxed && !pthread_equal(capture->thread, pthread_self()))
    return nullgpu_remember(cudaErrorStreamCaptureWrongThread);
  cudaError_t error = capture->error ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
  for (cudaStream_t s = streams; s; s = s->next)
    if (s->capture == capture) {
      if (s->unjoined && !error) error = cudaErrorStreamCaptureUnjoined;
      s->capture = NULL, s->unjoined = 0;
    }
  if (!error) *graph = capture->graph;
  capture->origin = NULL;
  under_way--;
  return nullgpu_remember(error);
}

static enum cudaStreamCaptureStatus status_of(struct capture* capture) {
  if (!capture) return cudaStreamCaptureStatusNone;
  return capture->error ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus* status) {
  *status = status_of(stream_of(stream)->capture);
  return cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus* status,
                                         unsigned long long* id, cudaGraph_t* graph, const cudaGraphNode_t** nodes,
                                         const cudaGraphEdgeData** edges, size_t* count) {
  struct capture* capture = stream_of(stream)->capture;
  *status = status_of(capture);
  if (id) *id = capture ? capture->id : 0;
  if (graph) *graph = capture ? capture->graph : NULL;
  if (nodes) *nodes = NULL;
  if (edges) *edges = NULL;
  if (count) *count = 0;
  return cudaSuccess;
}
API cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t stream, cudaGraphNode_t* nodes,
                                                    const cudaGraphEdgeData* edges, size_t count, unsigned flags) {
  return cudaSuccess;
}

// ---- graphs

API cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags) {
  *executable = calloc(1, 64);
  return cudaSuccess;
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph,
                                              unsigned long long flags) {
  return cudaGraphInstantiate(executable, graph, flags);
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  nullgpu_add(&nullgpu.graph_launches, 1);
  return nullgpu_enqueue(stream);
}
API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  if (nodes) return nullgpu_missing("cudaGraphGetNodes with nodes");
  *count = graph->launches;
  return cudaSuccess;
}
API cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  free(graph);
  return cudaSuccess;
}
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  free(executable);
  return cudaSuccess;
}
API cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* data, cudaHostFn_t destroy, unsigned count,
                                     unsigned flags) {
  *object = calloc(1, 64);  // never destroyed: what it keeps lives as long as the process
  return cudaSuccess;
}
API cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned count) { return cudaSuccess; }
API cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned count, unsigned flags) {
  return cudaSuccess;
}

// Streams, events and captures, as streams.c and capture.c know them.
#pragma once

#include <pthread.h>

#include "device.h"

struct capture {
  cudaStream_t origin;
  enum cudaStreamCaptureMode mode;
  pthread_t thread;
  unsigned long long id;
  cudaError_t error;  // what made it invalid
  cudaGraph_t graph;
};

struct CUstream_st {
  struct capture* capture;  // that it takes part in
  unsigned long work;       // how much it was given
  int unjoined;             // has work of a capture that the origin does not wait for yet
  int priority;
  struct CUstream_st* next;
};

struct CUevent_st {
  double ms;
  cudaStream_t stream;    // it was last recorded in
  unsigned long work;     // that the stream had then
  unsigned long long id;  // of the capture that it was recorded in, or 0
};

struct CUgraph_st {
  long launches;
};

#define MOST 16
extern struct capture captures[MOST];  // free where origin is NULL
extern int under_way;                  // how many are not
extern cudaStream_t streams;           // the last one made; next leads to the others

cudaStream_t stream_of(cudaStream_t stream);
struct capture* capture_of(cudaEvent_t event);                       // that it was recorded in, while that is under way
cudaError_t invalidate(struct capture* capture, cudaError_t error);  // counts the refused call, gives the error

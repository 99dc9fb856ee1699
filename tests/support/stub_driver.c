// A driver of CUDA whose kernels are functions of the host: (parameters, grid). Loaded under the real one's name.
#include <stddef.h>

typedef void (*Kernel)(void** parameters, const unsigned* grid);

int fail_with = 0, contexts = 0, launches = 0;

int cuLaunchKernel(Kernel kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  const unsigned grid[] = {gx, gy, gz, bx, shared};
  const int error = fail_with;
  fail_with = error == 201 && contexts == 0 ? 0 : error;
  if (error) return error;
  ++launches;
  kernel(parameters, grid);
  return 0;
}

typedef struct {
  unsigned gx, gy, gz, bx, by, bz, shared;
  void *stream, *attributes;
  unsigned count;
} Config;

int cuLaunchKernelEx(const Config* c, Kernel kernel, void** parameters, void** extra) {
  if (c->attributes || c->count) return 1;
  return cuLaunchKernel(kernel, c->gx, c->gy, c->gz, c->bx, c->by, c->bz, c->shared, c->stream, parameters, extra);
}

int cuDeviceGet(int* handle, int device) { return (*handle = device, 0); }
int cuDevicePrimaryCtxRetain(void** context, int device) { return (*context = &contexts, 0); }
int cuCtxSetCurrent(void* context) { return (++contexts, 0); }
int cuGetErrorString(int error, const char** said) { return (*said = "a stub's error", 0); }

// y[i] = alpha x[i] + beta z[i] for i < n; n is a 64-bit integer, grid[0] is added to show that it came.
void axpbz(void** p, const unsigned* grid) {
  const float *x = *(float**)p[0], *z = *(float**)p[1], alpha = *(float*)p[3];
  const double beta = *(double*)p[4];
  float* y = *(float**)p[2];
  const long long n = *(long long*)p[5];
  const int scratch = *(void**)p[6] == NULL && *(void**)p[7] == NULL;
  for (long long i = 0; i < n; ++i) y[i] = scratch ? alpha * x[i] + (float)beta * z[i] + (float)grid[0] : 0.0f;
}

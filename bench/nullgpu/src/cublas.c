// libcublas.so.13: a handle knows its stream, and whatever computes is one launch. NVIDIA's header is not included,
// since it needs more of the toolkit than PyTorch brings, and since arguments that are not read are left out.
#include <stdlib.h>

#include "device.h"

enum { SUCCESS = 0, EXECUTION_FAILED = 13 };  // of cublasStatus_t
#define VERSION 130101

struct handle {
  cudaStream_t stream;
  int math, pointers;  // modes
};

API int cublasCreate_v2(struct handle** handle) { return (*handle = calloc(1, sizeof **handle)) ? SUCCESS : 3; }
API int cublasDestroy_v2(struct handle* handle) {
  free(handle);
  return SUCCESS;
}
API int cublasGetVersion_v2(struct handle* handle, int* version) {
  *version = VERSION;
  return SUCCESS;
}
API int cublasSetWorkspace_v2(struct handle* handle) { return SUCCESS; }
API int cublasSetSmCountTarget(struct handle* handle) { return SUCCESS; }

#define SETTING(set, get, type, field)              \
  API int set(struct handle* handle, type value) {  \
    handle->field = value;                          \
    return SUCCESS;                                 \
  }                                                 \
  API int get(struct handle* handle, type* value) { \
    *value = handle->field;                         \
    return SUCCESS;                                 \
  }
SETTING(cublasSetStream_v2, cublasGetStream_v2, cudaStream_t, stream)
SETTING(cublasSetMathMode, cublasGetMathMode, int, math)
SETTING(cublasSetPointerMode_v2, cublasGetPointerMode_v2, int, pointers)

#define COMPUTES(name) \
  API int name(struct handle* handle) { return nullgpu_launch(handle->stream) ? EXECUTION_FAILED : SUCCESS; }
#define EACH_TYPE(name) COMPUTES(cublasS##name) COMPUTES(cublasD##name) COMPUTES(cublasC##name) COMPUTES(cublasZ##name)

EACH_TYPE(gemm_v2)
EACH_TYPE(gemmStridedBatched)
EACH_TYPE(gemv_v2)
EACH_TYPE(trsm_v2)
EACH_TYPE(trsmBatched)
EACH_TYPE(gelsBatched)
EACH_TYPE(geqrfBatched)
EACH_TYPE(getrfBatched)
EACH_TYPE(getrsBatched)
COMPUTES(cublasSdot_v2)
COMPUTES(cublasDdot_v2)
COMPUTES(cublasCdotc_v2)
COMPUTES(cublasCdotu_v2)
COMPUTES(cublasZdotc_v2)
COMPUTES(cublasZdotu_v2)
COMPUTES(cublasDotEx)
COMPUTES(cublasGemmEx)
COMPUTES(cublasGemmStridedBatchedEx)
COMPUTES(cublasGemmBatchedEx)
COMPUTES(cublasSgemmEx)

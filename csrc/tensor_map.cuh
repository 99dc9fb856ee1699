// Tensor maps: how TMA is told of a matrix. The driver encodes them, on the host, without touching the device.
#pragma once
#include <cuda.h>

#include <type_traits>

#include "driver.cuh"

namespace fastpeft {

using EncodeTiled = CUresult(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                             const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                             CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/// A matrix [rows, columns] of 16-bit T whose rows begin `stride` elements apart, moved in boxes of [box_rows,
/// box_columns] that are swizzled by 128 bytes in shared memory. Loads of what lies outside give zeros.
template <class T>
int tensor_map(CUtensorMap* map, const char* name, const void* data, int64_t rows, int64_t columns, int64_t stride,
               int box_rows, int box_columns) {
  static const auto encode = driver_entry<EncodeTiled>("cuTensorMapEncodeTiled");
  if (!encode) return fail(NO_DRIVER_ENTRY, "the driver has no cuTensorMapEncodeTiled, expected CUDA 12.0 or later");
  constexpr auto TYPE = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * sizeof(T)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result =
      encode(map, TYPE, 2, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return OK;
  return fail(CUDA_ERROR, "the driver refuses a tensor map for %s (code %d)", name, static_cast<int>(result));
}

}  // namespace fastpeft

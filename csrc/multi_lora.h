// The launcher of multi_lora.cu and what it is given. It returns 0, or a code of common.cuh's Error.
#pragma once
#include <cstdint>

namespace multi_lora {

constexpr int BLOCKS = 8;   // a cluster's size that every device with clusters can schedule
constexpr int TOKENS = 16;  // of a work item: two tiles of the tensor cores, which are 8 wide
constexpr int MAX_SLICES = 4;
constexpr int MAX_COLUMNS = 512;

enum Path : int { CLUSTER = 0, PLANES = 1 };

/// A and B are [slots, R, K] and [slots, N, R], adjacent along K and R, y [T, N] along N; strides are in elements.
struct Slice {
  const void* a;
  const void* b;
  void* y;
  const float* scales;  // [slots]
  const int* ranks;     // [slots], or null: all are `rank`
  int64_t stride_as, stride_ar, stride_bs, stride_bn, stride_ym;
  int rank, width;  // R and N
  int aligned_b;    // rows of B begin at multiples of 16 bytes
  int aligned_y;    // pairs of y's columns lie at multiples of 4 bytes
};

struct Params {
  Slice slices[MAX_SLICES];
  const void* x;      // [T, K], adjacent along K
  const int* order;   // [T]
  const int* starts;  // [slots + 1]
  const int* tiles;   // [2, tile_count]
  float* s;           // [T, sum of R] in the order of `order`, or null: what the backward pass needs
  float* planes;      // [BLOCKS, items, columns, TOKENS], of the two launches only
  int64_t stride_xm, stride_tiles, stride_sm;
  int k, slice_count, tile, tile_count;
  int items, columns;  // work items, and S's columns with every slice padded to 16
  int aligned_k;       // rows of x and of every A begin at multiples of 16 bytes
};

constexpr int up16(int n) { return (n + 15) / 16 * 16; }

inline bool multiple(const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

/// Fills in what follows from the rest. Returns what is wrong with the arguments, or null.
inline const char* complete(Params* p, int path) {
  if (path != CLUSTER && path != PLANES) return "path is neither 0 (cluster) nor 1 (planes)";
  if (p->slice_count < 1 || p->slice_count > MAX_SLICES) return "slices: expected 1 ... 4";
  if (p->tile < TOKENS || p->tile % TOKENS) return "tile: expected a multiple of 16";
  if (p->k < 1 || p->tile_count < 0) return "sizes: expected K >= 1 and tile_count >= 0";
  p->items = p->tile_count * (p->tile / TOKENS);
  p->columns = 0;
  p->aligned_k = multiple(p->x, 16) && p->stride_xm % 8 == 0;
  for (int i = 0; i < p->slice_count; ++i) {
    Slice& slice = p->slices[i];
    if (slice.rank < 1 || slice.rank > MAX_COLUMNS || slice.width < 0) return "slice: expected 1 <= R <= 512, N >= 0";
    p->columns += up16(slice.rank);
    if (!multiple(slice.a, 16) || slice.stride_ar % 8 || slice.stride_as % 8) p->aligned_k = 0;
    slice.aligned_b = multiple(slice.b, 16) && slice.stride_bn % 8 == 0 && slice.stride_bs % 8 == 0;
    slice.aligned_y = multiple(slice.y, 4) && slice.stride_ym % 2 == 0;
  }
  if (p->columns > MAX_COLUMNS) return "slices: their ranks, each rounded up to 16, exceed 512";
  if (path == PLANES && p->planes == nullptr) return "planes: expected a workspace";
  return nullptr;
}

}  // namespace multi_lora

/// dtype: 0 bfloat16, 1 float16, of x, A, B and y; path: multi_lora::Path; early: see multi_lora.cu.
extern "C" int fastpeft_multi_lora(const multi_lora::Params* given, int dtype, int path, int early, void* stream);

// What a block works on: tokens of one slot, a part of x's columns, a part of B's rows.
#pragma once
#include "multi_lora.h"
#include "ptx.cuh"

namespace multi_lora {

constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int STAGE_BYTES = 16384;  // of B, twice: with r = 16 and N = 4096 a block's part fits in one

/// Floats from one token's S to the next's: an odd multiple of 16, so that eight tokens lie in different banks.
constexpr int s_pitch(int columns) { return columns / 16 % 2 ? columns : columns + 16; }

/// Shared memory: the part that only shrink needs, and the part that only expand needs. The cluster kernel has both.
constexpr int shrink_bytes(int columns, int blocks) {
  return (WARPS * 16 * blocks + columns) * TOKENS * int(sizeof(float));
}
constexpr int expand_bytes(int columns) {
  return 16 + 2 * STAGE_BYTES + TOKENS * s_pitch(columns) * int(sizeof(float));
}

struct Item {
  int slot, first, count;  // first place in the order; a count of 0 is no work
};

/// Tiles may hold more than one item's tokens; those past the tile's last token are empty.
__device__ __forceinline__ Item find_item(const Params& p, int index) {
  const int tile = index / (p.tile / TOKENS), slot = p.tiles[tile];
  if (slot < 0) return {0, 0, 0};
  const int first = p.tiles[p.stride_tiles + tile] + index % (p.tile / TOKENS) * TOKENS;
  return {slot, first, max(0, min(p.starts[slot + 1] - first, TOKENS))};
}

/// A slot's true rank; a table that claims more than there is, or less than none, is not believed.
__device__ __forceinline__ int true_rank(const Slice& slice, int slot) {
  return slice.ranks == nullptr ? slice.rank : min(max(slice.ranks[slot], 0), slice.rank);
}

/// A row or a column of S: which slice it belongs to, and its rank there. Slices lie side by side by their true ranks.
struct Column {
  int slice, rank, of;  // `rank` < 0: past the last slice; `of` is the slot's true rank in that slice
};

__device__ __forceinline__ Column find_column(const Params& p, int slot, int column) {
  for (int i = 0; i < p.slice_count; ++i) {
    const int of = true_rank(p.slices[i], slot);
    if (column < up16(of)) return {i, column, of};
    column -= up16(of);
  }
  return {0, -1, 0};
}

__device__ __forceinline__ int columns_in_use(const Params& p, int slot) {
  int columns = 0;
  for (int i = 0; i < p.slice_count; ++i) columns += up16(true_rank(p.slices[i], slot));
  return columns;
}

/// Eight 16-bit elements at any address, those from `left` on as zeros that are not read.
template <class T>
__device__ __forceinline__ uint4 load8(const T* from, int left) {
  uint32_t word[4] = {0, 0, 0, 0};
  const uint16_t* bits = reinterpret_cast<const uint16_t*>(from);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < left) word[i / 2] |= uint32_t(bits[i]) << (i % 2 * 16);
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

/// Columns of x that block `part` multiplies: a multiple of 32, so that warps take whole steps; the last has the rest.
__device__ __forceinline__ int k_begin(const Params& p, int part) {
  return min(p.k, part * ((p.k + 32 * BLOCKS - 1) / (32 * BLOCKS) * 32));
}

/// Rows of a slice's B that block `part` multiplies: a multiple of 16.
__device__ __forceinline__ int n_begin(const Slice& slice, int part) {
  return min(slice.width, part * ((slice.width + 16 * BLOCKS - 1) / (16 * BLOCKS) * 16));
}

}  // namespace multi_lora

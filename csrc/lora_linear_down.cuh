// S = scale · drop(X) Aᵀ inside lora_linear.cuh, by the three warps beside the producer, while the consumers multiply.
#pragma once
#include "lora_linear_tiles.cuh"

namespace lora_linear {

constexpr int DOWN_ROWS = 8;  // a unit: the rows of S that a warp computes at a time

/// Counters of S's progress. Whoever is there takes the next rows, so it does not matter which blocks run at a time.
struct Workspace {
  uint32_t* words;
  __device__ __forceinline__ uint32_t* next() const { return words; }          // units of rows that were handed out
  __device__ __forceinline__ uint32_t* finished() const { return words + 1; }  // blocks that are done
  __device__ __forceinline__ uint32_t* ready(int tile) const { return words + 2 + tile; }  // units done of an M tile
};
__host__ __device__ constexpr int64_t workspace_words(int64_t M) { return 2 + (M + BLOCK_M - 1) / BLOCK_M; }

/// Zeros where the mask drops: four words of two adjacent columns each, from column k on.
__device__ __forceinline__ void drop(uint32_t (&x)[4], dropout::RowKey key, uint32_t k, uint32_t threshold) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t keep = dropout::keep_pair(key, k / 2 + i, threshold);
    x[i] &= (keep & 1 ? 0x0000ffffu : 0u) | (keep & 2 ? 0xffff0000u : 0u);
  }
}

/// Columns k ... k + 8 of a row, zeros past K. Without a branch: a load behind one would wait for those before it.
template <class T>
__device__ __forceinline__ uint4 load8(const T* row, int k, int K) {
  const uint4 loaded = __ldg(reinterpret_cast<const uint4*>(row + (k < K ? k : 0)));
  return k < K ? loaded : make_uint4(0, 0, 0, 0);
}

/// sᵀ [RANKS, 8] of rows m0 ... m0 + 8. A lane takes eight adjacent columns of a step of 32, in both operands: the sum
/// over k has no order of its own. Rows past M and ranks past R repeat the last one; nobody stores them.
template <int RANKS, class T>
__device__ __forceinline__ void down_rows(float (&sum)[RANKS / 16][4], const Params<T>& p, int m0) {
  constexpr int STEPS = RANKS > 16 ? 3 : 8;  // whose loads are in flight together: what 168 registers hold
  const int lane = threadIdx.x % 32, q = lane / 4, t = lane % 4;
  const int row = min(m0 + q, p.M - 1);
  const bool masked = p.mask.threshold != 0;
  const dropout::RowKey key = masked ? dropout::row_key(*p.mask.seed, row) : dropout::RowKey{0, 0};
#pragma unroll 1
  for (int first = t * 8; first - t * 8 < p.K; first += 32 * STEPS) {
    uint4 x[STEPS], a[STEPS][RANKS / 8];
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const int k = first + 32 * step;
      x[step] = load8(p.x + row * p.stride_x, k, p.K);
#pragma unroll
      for (int i = 0; i < RANKS / 8; ++i) a[step][i] = load8(p.a + min(i * 8 + q, p.R - 1) * p.stride_a, k, p.K);
    }
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      uint32_t word[4] = {x[step].x, x[step].y, x[step].z, x[step].w};
      if (masked) drop(word, key, first + 32 * step, p.mask.threshold);
#pragma unroll
      for (int i = 0; i < RANKS / 16; ++i) {
        const uint4 low = a[step][2 * i], high = a[step][2 * i + 1];
        ptx::mma_m16n8k16<T>(sum[i], low.x, high.x, low.y, high.y, word[0], word[1]);
        ptx::mma_m16n8k16<T>(sum[i], low.z, high.z, low.w, high.w, word[2], word[3]);
      }
    }
  }
}

/// One warp: takes rows of S, in the order in which tiles need them, until none are left.
template <int RANKS, class T>
__device__ __forceinline__ void down(const Params<T>& p) {
  const int lane = threadIdx.x % 32, q = lane / 4, t = lane % 4;
  const Workspace workspace{p.workspace};
  const float factor = p.scale * (p.mask.threshold ? p.inverse_keep : 1.f);
  for (;;) {
    uint32_t unit = lane ? 0 : ptx::fetch_add(workspace.next(), 1);
    const int m0 = static_cast<int>(__shfl_sync(0xffffffffu, unit, 0)) * DOWN_ROWS;
    if (m0 >= p.M) return;
    float sum[RANKS / 16][4] = {};
    down_rows<RANKS>(sum, p, m0);
#pragma unroll
    for (int i = 0; i < RANKS / 4; ++i) {
      const int row = m0 + t * 2 + i % 2, r = i / 4 * 16 + q + i / 2 % 2 * 8;
      const uint16_t value = ptx::pack<T>(sum[i / 4][i % 4] * factor, 0.f);
      if (row < p.M && r < p.R) ptx::store_global(reinterpret_cast<uint16_t*>(p.s) + row * p.stride_s + r, value);
    }
    ptx::fence_async_global();  // TMA will read what was stored here
    __syncwarp();
    if (lane == 0) {
      __threadfence();
      ptx::add_release(workspace.ready(m0 / BLOCK_M), 1);
    }
  }
}

/// One thread of every block, after all of its cluster: the last one leaves the counters as they were.
template <class T>
__device__ __forceinline__ void reset_workspace(const Params<T>& p) {
  const Workspace workspace{p.workspace};
  if (ptx::fetch_add(workspace.finished(), 1) + 1 < gridDim.x) return;
  for (int i = 0; i < workspace_words(p.M); ++i) workspace.words[i] = 0;
}

/// Waits until all rows of S that the M tile at row m0 has are there, and visible to TMA.
template <class T>
__device__ __forceinline__ void wait_for_down(const Params<T>& p, int m0) {
  if (m0 >= p.M) return;
  const uint32_t units = (min(p.M - m0, BLOCK_M) + DOWN_ROWS - 1) / DOWN_ROWS;
  const uint32_t* ready = Workspace{p.workspace}.ready(m0 / BLOCK_M);
  while (ptx::load_relaxed(ready) < units) {
  }
  ptx::load_acquire(ready);  // once: each one empties the L1 cache, under the loads of S
  ptx::fence_async_global();
}

}  // namespace lora_linear

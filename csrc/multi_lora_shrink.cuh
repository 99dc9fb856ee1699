// Shrink: S = scale · x Aᵀ of a work item, cut along K into eight partial sums, which are added in their order.
#pragma once
#include "multi_lora_item.cuh"

namespace multi_lora {

/// Starts to bring block `part`'s piece of A into L2. It does not depend on the kernels before.
template <class T>
__device__ __forceinline__ void prefetch_a(const Params& p, const Item& item, int part) {
  const int begin = k_begin(p, part), bytes = (k_begin(p, part + 1) - begin) / 8 * 16;
  if (!p.aligned_k || bytes == 0) return;
  for (int i = 0; i < p.slice_count; ++i) {
    const Slice& slice = p.slices[i];
    const T* a = static_cast<const T*>(slice.a) + item.slot * slice.stride_as + begin;
    const int rank = true_rank(slice, item.slot);
    for (int r = threadIdx.x; r < rank; r += THREADS) ptx::bulk_prefetch_l2(a + r * slice.stride_ar, bytes);
  }
}

/// partial [columns, TOKENS] = A x over block `part`'s columns of x, in shared memory;
/// `scratch` is [WARPS, 16 RB, TOKENS].
/// Inside a step of 32 columns a lane takes eight adjacent ones: tensor cores add in any order of columns.
template <class T, int RB>
__device__ __forceinline__ void shrink(const Params& p, const Item& item, int part, float* partial, float* scratch) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, q = lane / 4, t = lane % 4;
  const int begin = k_begin(p, part), end = k_begin(p, part + 1), columns = columns_in_use(p, item.slot);
  const T* x = static_cast<const T*>(p.x);
  const T* row0 = q < item.count ? x + p.order[item.first + q] * p.stride_xm : nullptr;
  const T* row1 = q + 8 < item.count ? x + p.order[item.first + q + 8] * p.stride_xm : nullptr;
  const bool two = item.count > 8;
  for (int first = 0; first < columns; first += 16 * RB) {
    float acc[RB][2][4] = {};
    const T* a[RB][2];
#pragma unroll
    for (int i = 0; i < 2 * RB; ++i) {
      const Column c = find_column(p, item.slot, first + i * 8 + q);
      const Slice& slice = p.slices[c.slice];
      const T* row = static_cast<const T*>(slice.a) + item.slot * slice.stride_as + c.rank * slice.stride_ar;
      a[i / 2][i % 2] = c.rank >= 0 && c.rank < c.of ? row : nullptr;
    }
#pragma unroll(4 / RB)
    for (int step = begin + warp * 32; step < end; step += WARPS * 32) {
      const int k = step + t * 8, left = end - k;
      const uint4 x0 = load8<T, false>(row0 == nullptr ? nullptr : row0 + k, left, p.aligned_k);
      const uint4 x1 = load8<T, false>(row1 == nullptr ? nullptr : row1 + k, left, p.aligned_k);
#pragma unroll
      for (int b = 0; b < RB; ++b) {
        const uint4 lo = load8<T, true>(a[b][0] == nullptr ? nullptr : a[b][0] + k, left, p.aligned_k);
        const uint4 hi = load8<T, true>(a[b][1] == nullptr ? nullptr : a[b][1] + k, left, p.aligned_k);
        ptx::mma_m16n8k16<T>(acc[b][0], lo.x, hi.x, lo.y, hi.y, x0.x, x0.y);
        ptx::mma_m16n8k16<T>(acc[b][0], lo.z, hi.z, lo.w, hi.w, x0.z, x0.w);
        if (two) {
          ptx::mma_m16n8k16<T>(acc[b][1], lo.x, hi.x, lo.y, hi.y, x1.x, x1.y);
          ptx::mma_m16n8k16<T>(acc[b][1], lo.z, hi.z, lo.w, hi.w, x1.z, x1.w);
        }
      }
    }
    float* own = scratch + warp * 16 * RB * TOKENS;
#pragma unroll
    for (int b = 0; b < RB; ++b) {
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        float* to = own + (b * 16 + q) * TOKENS + g * 8 + 2 * t;
        *reinterpret_cast<float2*>(to) = make_float2(acc[b][g][0], acc[b][g][1]);
        *reinterpret_cast<float2*>(to + 8 * TOKENS) = make_float2(acc[b][g][2], acc[b][g][3]);
      }
    }
    __syncthreads();
    const int size = min(16 * RB, columns - first) * TOKENS;
    for (int i = threadIdx.x; i < size; i += THREADS) {
      float sum = scratch[i];
#pragma unroll
      for (int w = 1; w < WARPS; ++w) sum += scratch[w * 16 * RB * TOKENS + i];
      partial[first * TOKENS + i] = sum;
    }
    __syncthreads();
  }
}

/// s [TOKENS, pitch] = scale times the partial sums, added in the order of the blocks; `partial(block, i)` is one of
/// them. Columns between a slice's true rank and the next multiple of 16 are 0 whatever the scale is.
template <class Partial>
__device__ __forceinline__ void gather(const Params& p, const Item& item, float* s, bool keep, Partial partial) {
  const int columns = columns_in_use(p, item.slot), pitch = s_pitch(p.columns);
  for (int i = threadIdx.x; i < columns * TOKENS; i += THREADS) {
    const int column = i / TOKENS, token = i % TOKENS;
    float sum = partial(0, i);
#pragma unroll
    for (int block = 1; block < BLOCKS; ++block) sum += partial(block, i);
    const Column c = find_column(p, item.slot, column);
    const bool real = c.rank < c.of;
    sum = real ? sum * p.slices[c.slice].scales[item.slot] : 0.f;
    s[token * pitch + column] = sum;
    if (keep && real && token < item.count) {
      int before = 0;
      for (int j = 0; j < c.slice; ++j) before += p.slices[j].rank;
      p.s[(item.first + token) * p.stride_sm + before + c.rank] = sum;
    }
  }
}

}  // namespace multi_lora

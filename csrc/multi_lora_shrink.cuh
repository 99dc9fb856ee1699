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

/// A step of 32 columns for 16 columns of S; a lane has eight adjacent ones: tensor cores add in any order of them.
template <class T>
__device__ __forceinline__ void multiply(float (&acc)[2][4], uint4 low, uint4 high, uint4 near, uint4 far) {
  ptx::mma_m16n8k16<T>(acc[0], low.x, high.x, low.y, high.y, near.x, near.y);
  ptx::mma_m16n8k16<T>(acc[0], low.z, high.z, low.w, high.w, near.z, near.w);
  ptx::mma_m16n8k16<T>(acc[1], low.x, high.x, low.y, high.y, far.x, far.y);
  ptx::mma_m16n8k16<T>(acc[1], low.z, high.z, low.w, high.w, far.z, far.w);
}

/// partial [columns, TOKENS] = A x over block `part`'s columns of x, in shared memory;
/// `scratch` is [WARPS, 16 RB, TOKENS].
/// Tokens that there are not repeat the item's last, ranks past a slice's last repeat that one: nobody looks at them.
template <class T, int RB>
__device__ __forceinline__ void shrink(const Params& p, const Item& item, int part, float* partial, float* scratch) {
  constexpr int STEPS = 4 / RB, STRIDE = WARPS * 32;  // steps whose loads are in flight together; columns between them
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, q = lane / 4, t = lane % 4;
  const int begin = k_begin(p, part), end = k_begin(p, part + 1), columns = columns_in_use(p, item.slot);
  const int whole = p.aligned_k ? begin + (end - begin) / 32 * 32 : begin;  // up to here, steps of 16-byte loads
  const T* x[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int token = min(q + 8 * i, item.count - 1);
    x[i] = static_cast<const T*>(p.x) + p.order[item.first + token] * p.stride_xm;
  }
  for (int first = 0; first < columns; first += 16 * RB) {
    float acc[RB][2][4] = {};
    const T* a[RB][2];
#pragma unroll
    for (int i = 0; i < 2 * RB; ++i) {
      const Column c = find_column(p, item.slot, min(first + i * 8 + q, columns - 1));
      const Slice& slice = p.slices[c.slice];
      const int64_t row = item.slot * slice.stride_as + min(c.rank, c.of - 1) * slice.stride_ar;
      a[i / 2][i % 2] = static_cast<const T*>(slice.a) + row;
    }
#pragma unroll 1
    for (int step = begin + warp * 32; step < whole; step += STEPS * STRIDE) {
      uint4 near[STEPS], far[STEPS], low[STEPS], high[STEPS];
      int k[STEPS];
#pragma unroll
      for (int j = 0; j < STEPS; ++j) {
        k[j] = (step + j * STRIDE < whole ? step + j * STRIDE : step) + t * 8;
        near[j] = *reinterpret_cast<const uint4*>(x[0] + k[j]);
        far[j] = *reinterpret_cast<const uint4*>(x[1] + k[j]);
      }
#pragma unroll
      for (int b = 0; b < RB; ++b) {
#pragma unroll
        for (int j = 0; j < STEPS; ++j) {
          low[j] = ptx::load_streaming(a[b][0] + k[j]);
          high[j] = ptx::load_streaming(a[b][1] + k[j]);
        }
#pragma unroll
        for (int j = 0; j < STEPS; ++j) {
          if (step + j * STRIDE < whole) multiply<T>(acc[b], low[j], high[j], near[j], far[j]);
        }
      }
    }
    // The last step where it is not whole, by the warp whose turn it is; or all, where rows are not aligned.
    const int done = (whole - begin) / 32;
#pragma unroll 1
    for (int step = whole + (warp + WARPS - done % WARPS) % WARPS * 32; step < end; step += STRIDE) {
      const int k = step + t * 8;
      const uint4 near = load8(x[0] + k, end - k), far = load8(x[1] + k, end - k);
#pragma unroll
      for (int b = 0; b < RB; ++b) {
        multiply<T>(acc[b], load8(a[b][0] + k, end - k), load8(a[b][1] + k, end - k), near, far);
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

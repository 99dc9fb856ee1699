// LoRA for a batch whose tokens belong to different adapters: y[t] += (scale x[t] Aᵀ) Bᵀ, A and B of t's slot.
//
// A work item is up to 16 tokens of one slot and all slices (q, k and v; gate and up) that share x. Eight blocks serve
// it: block c multiplies the c-th part of x's columns with A (shrink), the eight partial S are added in the order of
// the blocks, and block c then multiplies S with the c-th part of every B's rows (expand) and adds to y.
//
//     multi_lora_cluster      one launch: the eight blocks are a cluster and read each other's partial S directly
//     multi_lora_shrink, _expand   two launches, for devices without clusters: partial S go through planes in memory
//
// Both run the same sums in the same order, so they give the same bits; a token's bits depend on its own row, its slot,
// K and R, never on the other tokens. Tensor cores multiply x with A in 16 bits; S stays float: B is widened to float
// and S cut into two TF32 terms, which together hold 21 bits. Nothing beyond a slot's true rank is read.
//
// Alphabet: q = lane / 4 and t = lane % 4 place a lane in the tensor cores' tiles; columns of S are ranks of all
// slices, each slice padded to 16; a row of B is a column of y.
#pragma once
#include "multi_lora_expand.cuh"
#include "multi_lora_shrink.cuh"

namespace multi_lora {

/// One launch. Everything that this kernel reads before `dependency_wait` (weights, ranks, routing) must have been
/// written by a kernel that is known to be over: see multi_lora.cu.
template <class T, int RB>
__global__ void __launch_bounds__(THREADS, 2) multi_lora_cluster(const __grid_constant__ Params p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  uint8_t* memory = ptx::dynamic_shared();
  uint64_t* barriers = reinterpret_cast<uint64_t*>(memory);
  T* stages = reinterpret_cast<T*>(memory + 16);
  float* s = reinterpret_cast<float*>(memory + 16 + 2 * STAGE_BYTES);
  float* partial = s + TOKENS * s_pitch(p.columns);
  float* scratch = partial + p.columns * TOKENS;
  const int part = ptx::cluster_rank();
  const Item item = find_item(p, blockIdx.x / BLOCKS);
  Ring<T, true> ring{barriers, stages};
  if (item.count > 0) {
    ring.begin(p, item, part);
    prefetch_a<T>(p, item, part);
  }
  // Also by those who have nothing to do: the next kernel waits for this grid only, and this grid is its only link to
  // the kernels before.
  ptx::dependency_wait();
  ptx::dependents_launch();
  if (item.count == 0) return;  // all eight blocks
  shrink<T, RB>(p, item, part, partial, scratch);
  ptx::cluster_sync();
  gather(p, item, s, part == 0 && p.s != nullptr,
         [&](int block, int i) { return ptx::cluster_map(partial, block)[i]; });
  // Others may still read this block's partial sums: it must not exit before they have. Nothing is published.
  ptx::cluster_arrive_relaxed();
  __syncthreads();
  ring.expand(p, item, part, s);
  ptx::cluster_wait();
#else
  __trap();  // code for devices without clusters: nobody may launch this there
#endif
}

/// The first of two launches: this block's partial sums into its plane.
template <class T, int RB>
__global__ void __launch_bounds__(THREADS, 2) multi_lora_shrink(const __grid_constant__ Params p) {
  float* partial = reinterpret_cast<float*>(ptx::dynamic_shared());
  const int part = blockIdx.x % BLOCKS, index = blockIdx.x / BLOCKS;
  const Item item = find_item(p, index);
  if (item.count == 0) return;
  shrink<T, RB>(p, item, part, partial, partial + p.columns * TOKENS);
  float* plane = p.planes + (int64_t(part) * p.items + index) * p.columns * TOKENS;
  const int size = columns_in_use(p, item.slot) * TOKENS;
  for (int i = threadIdx.x; i < size; i += THREADS) plane[i] = partial[i];
}

/// The second: the planes' sum, in the order of the planes, times B.
template <class T>
__global__ void __launch_bounds__(THREADS, 2) multi_lora_expand(const __grid_constant__ Params p) {
  uint8_t* memory = ptx::dynamic_shared();
  float* s = reinterpret_cast<float*>(memory + 16 + 2 * STAGE_BYTES);
  const int part = blockIdx.x % BLOCKS, index = blockIdx.x / BLOCKS;
  const Item item = find_item(p, index);
  if (item.count == 0) return;
  Ring<T, false> ring{nullptr, reinterpret_cast<T*>(memory + 16)};
  ring.begin(p, item, part);
  const float* planes = p.planes + int64_t(index) * p.columns * TOKENS;
  const int64_t stride = int64_t(p.items) * p.columns * TOKENS;
  gather(p, item, s, part == 0 && p.s != nullptr, [&](int block, int i) { return planes[block * stride + i]; });
  __syncthreads();
  ring.expand(p, item, part, s);
}

}  // namespace multi_lora

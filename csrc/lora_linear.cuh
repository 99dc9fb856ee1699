// LoRA inside the GEMM of the layer it adapts, for Hopper. One kernel, three forms:
//
//     forward          Y  = X Wᵀ + S Bᵀ (+ bias)                    S given
//     forward + down   the same, and S = scale · drop(X) Aᵀ         computed inside by warps that would be idle
//     backward         dX = mask ∘ (dS A) / (1 - p) + dY W          the mask is drawn again, nothing was stored
//
// All are  out [M, N] = x [M, K] w + s [M, R] p  in one chain of float accumulators: the low-rank product is one to
// four more tiles of the loop over K, read through tensor maps of their own. w and p are [N, K] and [N, R] in the
// forward forms, [K, N] and [R, N] in backward.
//
// A cluster is two blocks, one above the other in M; each fetches half of their common tile of w and sends it to both.
// A block is three warpgroups: one brings tiles by TMA into a ring of stages, two multiply (64 rows each) by wgmma. The
// grid is persistent: a cluster takes every gridDim / 2-th tile.
//
//     full[stage]    the stage's bytes have arrived            1 arrival (the producer's, which names the bytes)
//     empty[stage]   nobody reads the stage any more           16 arrivals (4 warps of 2 consumers in each of the 2
//                                                              blocks, because the other block's half lands here too)
//
// lora_linear_produce.cuh, _consume.cuh and _down.cuh hold what each kind of warp does.
// Tiles are swizzled by 128 bytes: TMA writes and wgmma reads them so; the output's staging buffer is swizzled by hand.
#pragma once
#include "lora_linear_consume.cuh"
#include "lora_linear_down.cuh"
#include "lora_linear_produce.cuh"
#include "lora_linear_tiles.cuh"

namespace lora_linear {

/// DOWN_RANKS: 0 where S is given; else S of up to so many ranks is computed inside.
template <class T, class Config, Form FORM, int DOWN_RANKS>
__global__ void __launch_bounds__(THREADS, 1)
    kernel(const __grid_constant__ Maps maps, const __grid_constant__ Params<T> p) {
  using Memory = Shared<T, Config>;
  const uintptr_t start = reinterpret_cast<uintptr_t>(ptx::dynamic_shared());
  Memory& shared = *reinterpret_cast<Memory*>((start + 1023) & ~uintptr_t(1023));
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&maps.x, &maps.w, &maps.s, &maps.p, &maps.out}) ptx::tma_prefetch(map);
    for (int stage = 0; stage < Config::STAGES; ++stage) {
      ptx::mbarrier_init(&shared.full[stage], 1);
      ptx::mbarrier_init(&shared.empty[stage], 4 * CONSUMERS * CLUSTER);
    }
    ptx::mbarrier_fence_init();
  }
  ptx::cluster_sync();
  // Registers are dealt by warpgroup, 168 each at first: (40 + 2 · 232) in place of 3 · 168, unless S needs its share.
  if (threadIdx.x < 128) {
    if (!DOWN_RANKS) ptx::registers_decrease<40>();
    if (threadIdx.x == 0) {
      produce<T, Config, FORM, (DOWN_RANKS > 0)>(shared, maps, p);
    } else if (DOWN_RANKS && threadIdx.x >= 32) {
      down<DOWN_RANKS ? DOWN_RANKS : 16>(p);
    }
  } else {
    if (!DOWN_RANKS) ptx::registers_increase<232>();
    consume<T, Config, FORM>(shared, maps, p);
  }
  // The producer's warp comes together again: the barrier below is for whole warps.
  __syncwarp();
  ptx::cluster_sync();  // a block that leaves takes its shared memory along, and its peer may still signal there
  if (DOWN_RANKS && threadIdx.x == 0) reset_workspace(p);
}

}  // namespace lora_linear

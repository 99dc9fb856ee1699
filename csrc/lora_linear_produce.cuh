// The producer of lora_linear.cuh: one thread that brings every tile by TMA.
#pragma once
#include "lora_linear_down.cuh"
#include "lora_linear_tiles.cuh"

namespace lora_linear {

/// One thread: brings every tile of every output tile of this cluster.
template <class T, class Config, Form FORM, bool DOWN>
__device__ __forceinline__ void produce(Shared<T, Config>& shared, const Maps& maps, const Params<T>& p) {
  constexpr int N = Config::BLOCK_N;
  const Tiles tiles = Tiles::of<Config>(p);
  const uint32_t rank = ptx::cluster_rank();
  Ring<Config> ring;
  for (int tile = blockIdx.x / CLUSTER; tile < tiles.count(); tile += gridDim.x / CLUSTER) {
    int pair, column;
    tiles.locate(tile, pair, column);
    const int m0 = (pair * CLUSTER + static_cast<int>(rank)) * BLOCK_M, n0 = column * N;
#pragma unroll 1
    for (int i = 0; i < tiles.base + tiles.low; ++i) {
      // Forward ends with the low-rank tiles, because S may come late; backward begins with them, because the mask is
      // theirs alone.
      const bool low = FORM == Form::FORWARD ? i >= tiles.base : i < tiles.low;
      const int before = FORM == Form::FORWARD ? (low ? tiles.base : 0) : (low ? 0 : tiles.low);
      const int k = (i - before) * BLOCK_K;
      const CUtensorMap* x = low ? &maps.s : &maps.x;
      const CUtensorMap* w = low ? &maps.p : &maps.w;
      uint64_t* full = &shared.full[ring.stage];
      ptx::mbarrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
      if constexpr (DOWN) {
        if (i == tiles.base) wait_for_down(p, m0);
      }
      ptx::mbarrier_arrive_expect(full, Config::STAGE_BYTES);
      ptx::tma_load(shared.x[ring.stage], x, full, k, m0);
      if constexpr (FORM == Form::FORWARD) {
        const int half = rank * (N / 2);
        ptx::tma_load_multicast(shared.w[ring.stage] + half * BLOCK_K, w, full, k, n0 + half, 0b11);
      } else {
#pragma unroll
        for (int j = rank * (N / 128); j < static_cast<int>(rank + 1) * (N / 128); ++j) {
          ptx::tma_load_multicast(shared.w[ring.stage] + j * 64 * BLOCK_K, w, full, n0 + j * 64, k, 0b11);
        }
      }
      ring.advance();
    }
  }
}

}  // namespace lora_linear

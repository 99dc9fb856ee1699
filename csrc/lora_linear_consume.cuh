// The consumers of lora_linear.cuh: two warpgroups that multiply, mask, add the bias, round and store.
#pragma once
#include "lora_linear_mask.cuh"
#include "lora_linear_tiles.cuh"

namespace lora_linear {

/// wgmma's description of a tile in 128-byte swizzle. `leading`: from one 64-element block to the next along the major
/// dimension where that is not k (else unused); `stride`: from one group of eight 128-byte lines to the next.
__device__ __forceinline__ uint64_t descriptor(const void* tile, uint32_t leading, uint32_t stride) {
  return static_cast<uint64_t>((ptx::shared_address(tile) & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | 1ull << 62;
}

/// A consumer warpgroup: its 64 rows, its registers, its place in the ring.
template <class T, class Config, Form FORM>
struct Consumer {
  static constexpr int N = Config::BLOCK_N;
  Shared<T, Config>& shared;
  const int index, thread;  // which consumer, which of its threads
  Ring<Config> ring = {};
  int previous = -1;  // the stage whose product may still be running
  int buffer = 0;     // of the two staging buffers, the one to be used next
  float acc[N / 2];

  __device__ __forceinline__ Consumer(Shared<T, Config>& shared)
      : shared(shared), index(threadIdx.x / 128 - 1), thread(threadIdx.x % 128) {}

  /// acc (+)= the first 16 STEPS columns of the tiles in this stage.
  template <int STEPS>
  __device__ __forceinline__ void multiply(bool accumulate) {
    constexpr bool N_MAJOR = FORM == Form::BACKWARD;
    const uint64_t x = descriptor(shared.x[ring.stage] + index * 64 * BLOCK_K, 16, 1024);
    const uint64_t w = descriptor(shared.w[ring.stage], N_MAJOR ? 64 * BLOCK_K * 2 : 16, 1024);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      ptx::Wgmma<T, N, N_MAJOR>::mma(acc, x + step * (32 >> 4), w + step * ((N_MAJOR ? 16 * 128 : 32) >> 4),
                                     accumulate || step > 0);
    }
    ptx::wgmma_commit();
  }

  /// This warp no longer reads the stage, in either block: a wait for wgmma speaks for the warp that waited alone.
  __device__ __forceinline__ void release(int stage) {
    const int lane = thread % 32;
    if (lane < CLUSTER) ptx::mbarrier_arrive_cluster(&shared.empty[stage], lane);
  }

  /// The next tile of the ring: multiplies it while the one before may still run, then gives that one back.
  template <int STEPS>
  __device__ __forceinline__ void next_tile(bool accumulate = true) {
    ptx::mbarrier_wait(&shared.full[ring.stage], ring.parity);
    ptx::pin_registers(acc);
    multiply<STEPS>(accumulate);
    ptx::wgmma_wait<1>();
    ptx::pin_registers(acc);
    if (previous >= 0) release(previous);
    previous = ring.stage;
    ring.advance();
  }

  __device__ __forceinline__ void finish_tiles() {
    ptx::wgmma_wait<0>();
    ptx::pin_registers(acc);
    release(previous);
    previous = -1;
  }

  /// The last low-rank tile has 1 to 64 columns. As a template argument, because a loop would serialise wgmma.
  __device__ __forceinline__ void short_tile(int columns, bool accumulate) {
    if (columns > 48) {
      next_tile<4>(accumulate);
    } else if (columns > 32) {
      next_tile<3>(accumulate);
    } else if (columns > 16) {
      next_tile<2>(accumulate);
    } else {
      next_tile<1>(accumulate);
    }
  }

  /// Backward: the low-rank product alone, masked.
  __device__ __forceinline__ void low_rank_backward(const Params<T>& p, int low, const TileMask<N>& mask) {
#pragma unroll 1
    for (int i = 0; i < low - 1; ++i) next_tile<BLOCK_K / 16>(i > 0);
    short_tile(p.R - (low - 1) * BLOCK_K, low > 1);
    if (p.mask.threshold) {
      finish_tiles();
#pragma unroll
      for (int i = 0; i < N / 2; ++i) acc[i] = mask.keeps(i) ? acc[i] * p.inverse_keep : 0.f;
    }
  }

  /// Asks for the bias of the tile, a part of it for each lane: pairs of columns 2 lane + 64 i.
  __device__ __forceinline__ void load_bias(uint32_t (&pairs)[N / 64], const Params<T>& p, int n0) {
    const uint16_t* bias = reinterpret_cast<const uint16_t*>(p.bias);
#pragma unroll
    for (int i = 0; i < N / 64; ++i) {
      const int c = n0 + i * 64 + thread % 32 * 2;
      const uint32_t even = bias && c < p.N ? bias[c] : 0, odd = bias && c + 1 < p.N ? bias[c + 1] : 0;
      pairs[i] = even | odd << 16;
    }
  }

  /// a holds columns 16 j + 2 (lane % 4) and the next of two rows, then the columns 8 further.
  __device__ __forceinline__ void add_bias(uint32_t pairs, int j, float* a) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t pair = __shfl_sync(0xffffffffu, pairs, j * 8 + half * 4 + thread % 4);
      const float2 bias = ptx::unpack<T>(pair);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        a[half * 4 + row * 2] += bias.x;
        a[half * 4 + row * 2 + 1] += bias.y;
      }
    }
  }

  /// Rounds, and stores 64 columns at a time through the staging buffers: one fills while TMA empties the other.
  __device__ __forceinline__ void store(const Maps& maps, const Params<T>& p, const uint32_t (&bias)[N / 64], int m0,
                                        int n0) {
    const int lane = thread % 32, row = thread / 32 * 16 + lane % 16;
#pragma unroll
    for (int chunk = 0; chunk < N / 64; ++chunk) {
      T* staging = shared.out[index][buffer];
      if (thread == 0) ptx::bulk_wait_read<1>();  // the store before the last one, from this buffer, has read it
      ptx::barrier_sync(1 + index, 128);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float* a = acc + chunk * 32 + j * 8;
        if (FORM == Form::FORWARD && p.bias) add_bias(bias[chunk], j, a);
        const int line = (j * 2 + lane / 16) ^ (row & 7);  // the swizzle: 16-byte units of a row, permuted by the row
        ptx::stmatrix_x4(staging + row * 64 + line * 8, ptx::pack<T>(a[0], a[1]), ptx::pack<T>(a[2], a[3]),
                         ptx::pack<T>(a[4], a[5]), ptx::pack<T>(a[6], a[7]));
      }
      ptx::fence_async_shared();
      ptx::barrier_sync(1 + index, 128);
      if (thread == 0) {
        ptx::tma_store(&maps.out, staging, n0 + chunk * 64, m0);
        ptx::bulk_commit();
      }
      buffer ^= 1;
    }
  }
};

template <class T, class Config, Form FORM>
__device__ __forceinline__ void consume(Shared<T, Config>& shared, const Maps& maps, const Params<T>& p) {
  const Tiles tiles = Tiles::of<Config>(p);
  Consumer<T, Config, FORM> consumer(shared);
  const bool masked = FORM == Form::BACKWARD && tiles.low && p.mask.threshold;
  const int64_t seed = masked ? *p.mask.seed : 0;
  TileMask<Config::BLOCK_N> mask;  // of the next low-rank product
  struct Place {
    int m0, n0;
  };
  const auto locate = [&](int tile) -> Place {
    int pair, column;
    tiles.locate(tile, pair, column);
    return {(pair * CLUSTER + static_cast<int>(ptx::cluster_rank())) * BLOCK_M + consumer.index * 64,
            column * Config::BLOCK_N};
  };
  const auto begin_mask = [&](int tile) {
    const int warp = consumer.thread / 32, lane = consumer.thread % 32;
    const Place at = locate(tile);
    mask.begin(seed, at.m0 + warp * 16 + lane / 4, at.n0 + lane % 4 * 2);
  };
  int tile = blockIdx.x / CLUSTER;
  if (masked) {
    begin_mask(tile);
    mask.finish(p.mask.threshold);
  }
  while (tile < tiles.count()) {
    const bool masked_first = FORM == Form::BACKWARD && tiles.low;
    if (masked_first) consumer.low_rank_backward(p, tiles.low, mask);
    consumer.template next_tile<BLOCK_K / 16>(masked_first);
    const int next = tile + gridDim.x / CLUSTER;
    const int full = tiles.base + (FORM == Form::FORWARD && tiles.low ? tiles.low - 1 : 0);
    int i = 1;
    if (masked && next < tiles.count()) {  // while this tile is multiplied
      begin_mask(next);
#pragma unroll 1
      for (; i < full && !mask.complete(); ++i) {
        consumer.template next_tile<BLOCK_K / 16>();
        mask.draw(p.mask.threshold);
      }
    }
    const Place at = locate(tile);
    uint32_t bias[Config::BLOCK_N / 64] = {};
    if (FORM == Form::FORWARD) consumer.load_bias(bias, p, at.n0);  // arrives under the products
#pragma unroll 1
    for (; i < full; ++i) consumer.template next_tile<BLOCK_K / 16>();
    if (FORM == Form::FORWARD && tiles.low) consumer.short_tile(p.R - (tiles.low - 1) * BLOCK_K, true);
    if (masked && next < tiles.count()) mask.finish(p.mask.threshold);
    consumer.finish_tiles();
    consumer.store(maps, p, bias, at.m0, at.n0);
    tile = next;
  }
  if (consumer.thread == 0) ptx::bulk_wait<0>();
}

}  // namespace lora_linear

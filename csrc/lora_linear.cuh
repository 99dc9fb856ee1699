// LoRA inside the GEMM of the layer it adapts, for Hopper. One kernel, three forms:
//
//     forward          Y  = X Wᵀ + S Bᵀ (+ bias)                    S given
//     forward + down   the same, and S = scale · drop(X) Aᵀ         computed inside by warps that would be idle
//     backward         dX = mask ∘ (dS A) / (1 - p) + dY W          the mask is drawn again, nothing was stored
//
// All are  out [M, N] = x [M, K] w + s [M, R] p  in one chain of float accumulators: the low-rank product is one to four
// more tiles of the loop over K, read through tensor maps of their own. w and p are [N, K] and [N, R] in the forward
// forms, [K, N] and [R, N] in backward.
//
// A cluster is two blocks, one above the other in M; each fetches half of their common tile of w and sends it to both.
// A block is three warpgroups: one brings tiles by TMA into a ring of stages, two multiply (64 rows each) by wgmma. The
// grid is persistent: a cluster takes every gridDim / 2-th tile.
//
//     full[stage]    the stage's bytes have arrived            1 arrival (the producer's, which names the bytes)
//     empty[stage]   nobody reads the stage any more           4 arrivals (2 consumers in each of the 2 blocks, because
//                                                              the other block's half lands here too)
//
// Tiles are swizzled by 128 bytes: TMA writes and wgmma reads them so; the output's staging buffer is swizzled by hand.
#pragma once
#include "dropout.cuh"
#include "ptx.cuh"

namespace lora_linear {

constexpr int BLOCK_M = 128, BLOCK_K = 64;  // BLOCK_K: one 128-byte line of the swizzle
constexpr int CONSUMERS = 2, THREADS = 128 * (1 + CONSUMERS), CLUSTER = 2;
constexpr int GROUP = 4;      // pairs of M tiles that are walked N first: their x and one column of w stay in L2
constexpr int DOWN_ROWS = 8;  // rows of S that a warp computes at a time

/// Tile sizes; what a multiprocessor's 227 KB hold decides the number of stages.
template <int BLOCK_N_, int STAGES_>
struct Config {
  static constexpr int BLOCK_N = BLOCK_N_, STAGES = STAGES_;
  static constexpr uint32_t STAGE_BYTES = (BLOCK_M + BLOCK_N) * BLOCK_K * 2;
};
using Wide = Config<256, 4>;    // most products per byte of shared memory: where there are tiles for every block
using Narrow = Config<128, 6>;  // twice the tiles: where Wide would leave blocks idle

enum class Form { FORWARD, BACKWARD };

/// Tensor maps. Boxes are 64 columns wide; x, s: BLOCK_M rows; w, p: BLOCK_N / 2 rows forward, 64 backward; out: 64.
struct Maps {
  CUtensorMap x, w, s, p, out;
};

template <class T>
struct Params {
  int M, N, K, R;
  const T* bias;       // [N] or null
  dropout::Mask mask;  // of out in backward, of x in forward + down
  float inverse_keep;  // 1 / (1 - p)
  // Only where S is computed inside. Strides are in elements.
  const T* x;
  const T* a;  // [R, K]
  T* s;        // [M, R]
  int64_t stride_x, stride_a, stride_s;
  float scale;
  uint32_t* workspace;  // see Workspace; all zeros between launches
};

/// Counters of S's progress. Whoever is there takes the next rows, so it does not matter which blocks run at a time.
struct Workspace {
  uint32_t* words;
  __device__ __forceinline__ uint32_t* next() const { return words; }                   // rows handed out, in DOWN_ROWS
  __device__ __forceinline__ uint32_t* finished() const { return words + 1; }           // blocks that are done
  __device__ __forceinline__ uint32_t* ready(int tile) const { return words + 2 + tile; }  // rows of an M tile, likewise
};
__host__ __device__ constexpr int64_t workspace_words(int64_t M) {
  return 2 + (M + BLOCK_M - 1) / BLOCK_M;
}

template <class T, class Config>
struct __align__(1024) Shared {
  T x[Config::STAGES][BLOCK_M * BLOCK_K];
  T w[Config::STAGES][Config::BLOCK_N * BLOCK_K];
  T out[CONSUMERS][2][64 * 64];
  uint64_t full[Config::STAGES], empty[Config::STAGES];
};
template <class Config>
constexpr int shared_bytes = sizeof(Shared<uint16_t, Config>) + 1024;  // dynamic shared memory is aligned to 16 only

/// A place in the ring of stages, and the parity of the phase that is next there.
template <class Config>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == Config::STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

struct Tiles {
  int pairs, columns, base, low;  // pairs of M tiles, N tiles, K tiles of the base and of the low-rank product

  template <class Config, class Params>
  __host__ __device__ __forceinline__ static Tiles of(const Params& p) {
    return {(p.M + CLUSTER * BLOCK_M - 1) / (CLUSTER * BLOCK_M), (p.N + Config::BLOCK_N - 1) / Config::BLOCK_N,
            (p.K + BLOCK_K - 1) / BLOCK_K, (p.R + BLOCK_K - 1) / BLOCK_K};
  }
  __host__ __device__ __forceinline__ int count() const { return pairs * columns; }

  /// The pair and the column of the `index`-th tile.
  __device__ __forceinline__ void locate(int index, int& pair, int& column) const {
    const int first = index / (GROUP * columns) * GROUP, height = min(GROUP, pairs - first);
    const int rest = index - first * columns;
    pair = first + rest % height;
    column = rest / height;
  }
};

// ---- producer -------------------------------------------------------------------------------------------------------

/// Waits until all rows of S that the M tile at row m0 has are there, and visible to TMA.
template <class T>
__device__ __forceinline__ void wait_for_down(const Params<T>& p, int m0) {
  if (m0 >= p.M) return;
  const uint32_t units = (min(p.M - m0, BLOCK_M) + DOWN_ROWS - 1) / DOWN_ROWS;
  while (ptx::load_acquire(Workspace{p.workspace}.ready(m0 / BLOCK_M)) < units) {
  }
  ptx::fence_async_global();
}

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

// ---- S, by the three warps beside the producer ----------------------------------------------------------------------

/// Zeros where the mask drops: four words of two adjacent columns each, from column k on.
__device__ __forceinline__ void drop(uint32_t (&x)[4], dropout::RowKey key, uint32_t k, uint32_t threshold) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t keep = dropout::keep_pair(key, k / 2 + i, threshold);
    x[i] &= (keep & 1 ? 0x0000ffffu : 0u) | (keep & 2 ? 0xffff0000u : 0u);
  }
}

/// sᵀ [RANKS, 8] of rows m0 ... m0 + 8. A lane takes eight adjacent columns of a step of 32, in both operands: the sum
/// over k has no order of its own.
template <int RANKS, class T>
__device__ __forceinline__ void down_rows(float (&sum)[RANKS / 16][4], const Params<T>& p, int m0) {
  const int lane = threadIdx.x % 32, q = lane / 4, t = lane % 4;
  const int row = min(m0 + q, p.M - 1);
  const bool masked = p.mask.threshold != 0;
  const dropout::RowKey key = masked ? dropout::row_key(*p.mask.seed, row) : dropout::RowKey{0, 0};
  const uint4 zero = make_uint4(0, 0, 0, 0);
#pragma unroll(RANKS >= 64 ? 1 : 4)  // loads in flight, as far as the registers go
  for (int k = t * 8; k - t * 8 < p.K; k += 32) {
    const bool inside = k < p.K;
    const uint4 x = inside ? __ldg(reinterpret_cast<const uint4*>(p.x + row * p.stride_x + k)) : zero;
    uint32_t word[4] = {x.x, x.y, x.z, x.w};
    if (masked) drop(word, key, k, p.mask.threshold);
#pragma unroll
    for (int i = 0; i < RANKS / 16; ++i) {
      const int r = i * 16 + q;
      const T* a = p.a + r * p.stride_a + k;
      const uint4 low = inside && r < p.R ? __ldg(reinterpret_cast<const uint4*>(a)) : zero;
      const uint4 high = inside && r + 8 < p.R ? __ldg(reinterpret_cast<const uint4*>(a + 8 * p.stride_a)) : zero;
      ptx::mma_m16n8k16<T>(sum[i], low.x, high.x, low.y, high.y, word[0], word[1]);
      ptx::mma_m16n8k16<T>(sum[i], low.z, high.z, low.w, high.w, word[2], word[3]);
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
      const uint32_t value = ptx::pack<T>(sum[i / 4][i % 4] * factor, 0.f);
      if (row < p.M && r < p.R) reinterpret_cast<uint16_t*>(p.s)[row * p.stride_s + r] = static_cast<uint16_t>(value);
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

// ---- consumers ------------------------------------------------------------------------------------------------------

/// wgmma's description of a tile in 128-byte swizzle. `leading`: from one 64-element block to the next along the major
/// dimension where that is not k (else unused); `stride`: from one group of eight 128-byte lines to the next.
__device__ __forceinline__ uint64_t descriptor(const void* tile, uint32_t leading, uint32_t stride) {
  return static_cast<uint64_t>((ptx::shared_address(tile) & 0x3ffff) >> 4) |
         static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32 | 1ull << 62;
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

  /// Both blocks may fill the stage again.
  __device__ __forceinline__ void release(int stage) {
    if (thread < CLUSTER) ptx::mbarrier_arrive_cluster(&shared.empty[stage], thread);
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

  /// Backward: the mask's bits of this thread's elements, two for each pair of columns.
  __device__ __forceinline__ void draw_mask(uint32_t (&bits)[N / 64], const dropout::Mask& mask, int m0, int n0) {
    const int row = m0 + thread / 32 * 16 + thread % 32 / 4;
    const dropout::RowKey keys[2] = {dropout::row_key(*mask.seed, row), dropout::row_key(*mask.seed, row + 8)};
#pragma unroll
    for (int i = 0; i < N / 64; ++i) {
      bits[i] = 0;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const int pair = i * 16 + j, column = n0 + pair / 2 * 8 + thread % 4 * 2;
        bits[i] |= dropout::keep_pair(keys[pair % 2], column / 2, mask.threshold) << (2 * j);
      }
    }
  }

  __device__ __forceinline__ void apply_mask(const uint32_t (&bits)[N / 64], float inverse_keep) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) acc[i] = bits[i / 32] >> (i % 32) & 1 ? acc[i] * inverse_keep : 0.f;
  }

  /// The low-rank product alone, masked.
  __device__ __forceinline__ void low_rank_backward(const Params<T>& p, int low, int m0, int n0) {
#pragma unroll 1
    for (int i = 0; i < low - 1; ++i) next_tile<BLOCK_K / 16>(i > 0);
    short_tile(p.R - (low - 1) * BLOCK_K, low > 1);
    if (p.mask.threshold) {
      uint32_t bits[N / 64];
      draw_mask(bits, p.mask, m0, n0);
      finish_tiles();
      apply_mask(bits, p.inverse_keep);
    }
  }

  __device__ __forceinline__ void add_bias(const T* bias, int column, int end, float* a) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // a holds columns c, c + 1 of two rows, then c + 8, c + 9 of the two
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int c = column + half * 8 + odd;
        const float value = c < end ? static_cast<float>(bias[c]) : 0.f;
        a[half * 4 + odd] += value;
        a[half * 4 + 2 + odd] += value;
      }
    }
  }

  /// Rounds, and stores 64 columns at a time through the staging buffers: one fills while TMA empties the other.
  __device__ __forceinline__ void store(const Maps& maps, const Params<T>& p, int m0, int n0) {
    const int lane = thread % 32, row = thread / 32 * 16 + lane % 16;
#pragma unroll
    for (int chunk = 0; chunk < N / 64; ++chunk) {
      T* staging = shared.out[index][buffer];
      if (thread == 0) ptx::bulk_wait_read<1>();  // the store before the last one, from this buffer, has read it
      ptx::barrier_sync(1 + index, 128);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float* a = acc + chunk * 32 + j * 8;
        if (p.bias) add_bias(p.bias, n0 + chunk * 64 + j * 16 + lane % 4 * 2, p.N, a);
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
  for (int tile = blockIdx.x / CLUSTER; tile < tiles.count(); tile += gridDim.x / CLUSTER) {
    int pair, column;
    tiles.locate(tile, pair, column);
    const int m0 = (pair * CLUSTER + ptx::cluster_rank()) * BLOCK_M + consumer.index * 64;
    const int n0 = column * Config::BLOCK_N;
    const bool masked_first = FORM == Form::BACKWARD && tiles.low;
    if (masked_first) consumer.low_rank_backward(p, tiles.low, m0, n0);
    consumer.template next_tile<BLOCK_K / 16>(masked_first);
    const int full = tiles.base + (FORM == Form::FORWARD && tiles.low ? tiles.low - 1 : 0);
#pragma unroll 1
    for (int i = 1; i < full; ++i) consumer.template next_tile<BLOCK_K / 16>();
    if (FORM == Form::FORWARD && tiles.low) consumer.short_tile(p.R - (tiles.low - 1) * BLOCK_K, true);
    consumer.finish_tiles();
    consumer.store(maps, p, m0, n0);
  }
  if (consumer.thread == 0) ptx::bulk_wait<0>();
}

// ---- kernel ---------------------------------------------------------------------------------------------------------

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
      ptx::mbarrier_init(&shared.empty[stage], CONSUMERS * CLUSTER);
    }
    ptx::mbarrier_fence_init();
  }
  ptx::cluster_sync();
  // Registers are dealt by warpgroup, 168 each at first: (40 + 2 · 232) or (88 + 2 · 208) in place of 3 · 168.
  if (threadIdx.x < 128) {
    ptx::registers_decrease<DOWN_RANKS ? 88 : 40>();
    if (threadIdx.x == 0) {
      produce<T, Config, FORM, (DOWN_RANKS > 0)>(shared, maps, p);
    } else if (DOWN_RANKS && threadIdx.x >= 32) {
      down<DOWN_RANKS ? DOWN_RANKS : 16>(p);
    }
  } else {
    ptx::registers_increase<DOWN_RANKS ? 208 : 232>();
    consume<T, Config, FORM>(shared, maps, p);
  }
  __syncwarp();  // the producer's warp comes together again: the barrier below is for whole warps
  ptx::cluster_sync();  // a block that leaves takes its shared memory along, and its peer may still signal there
  if (DOWN_RANKS && threadIdx.x == 0) reset_workspace(p);
}

}  // namespace lora_linear

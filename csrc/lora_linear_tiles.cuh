// What the warps of lora_linear.cuh share: sizes, arguments, shared memory, the ring of stages, the order of tiles.
#pragma once
#include "dropout.cuh"
#include "ptx.cuh"

namespace lora_linear {

constexpr int BLOCK_M = 128, BLOCK_K = 64;  // BLOCK_K: one 128-byte line of the swizzle
constexpr int CONSUMERS = 2, THREADS = 128 * (1 + CONSUMERS), CLUSTER = 2;
constexpr int START = 256;  // k tiles that take a hundred times what a cluster's start takes: predicted, not measured
constexpr int GROUP = 4;  // pairs of M tiles that are walked N first: their x and one column of w stay in L2

/// Tile sizes; what a multiprocessor's 227 KB hold decides the number of stages.
template <int BLOCK_N_, int STAGES_>
struct TileSizes {
  static constexpr int BLOCK_N = BLOCK_N_, STAGES = STAGES_;
  static constexpr uint32_t STAGE_BYTES = (BLOCK_M + BLOCK_N) * BLOCK_K * 2;
};
using Wide = TileSizes<256, 4>;    // most products per byte of shared memory: where there are tiles for every block
using Narrow = TileSizes<128, 6>;  // twice the tiles: where Wide would leave blocks idle

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
  uint32_t* workspace;  // see lora_linear_down.cuh; all zeros between launches
};

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

  template <class Config, class T>
  __host__ __device__ __forceinline__ static Tiles of(const Params<T>& p) {
    return {(p.M + CLUSTER * BLOCK_M - 1) / (CLUSTER * BLOCK_M), (p.N + Config::BLOCK_N - 1) / Config::BLOCK_N,
            (p.K + BLOCK_K - 1) / BLOCK_K, (p.R + BLOCK_K - 1) / BLOCK_K};
  }
  __host__ __device__ __forceinline__ int count() const { return pairs * columns; }

  /// Clusters of the grid. Where there is much to do they are more than the device holds at a time: whoever is free gets
  /// the next, so that another kernel on one multiprocessor costs a share of the time, and does not double it.
  int clusters(int resident) const {
    const int waves = (count() + resident - 1) / resident;
    const int64_t rounds = 1 + int64_t(waves) * (base + low) / START;
    return static_cast<int>(rounds < waves ? rounds * resident : count());
  }

  /// The pair and the column of the `index`-th tile.
  __device__ __forceinline__ void locate(int index, int& pair, int& column) const {
    const int first = index / (GROUP * columns) * GROUP, height = min(GROUP, pairs - first);
    const int rest = index - first * columns;
    pair = first + rest % height;
    column = rest / height;
  }
};

}  // namespace lora_linear

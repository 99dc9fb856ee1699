// LoRA for a batch whose tokens belong to different adapters: y[t] += (scale x[t] Aᵀ) Bᵀ, A and B of t's slot.
//
// A work item is up to 16 tokens of one slot and all slices (q, k and v; gate and up) that share x. Eight blocks serve
// it: block c multiplies the c-th part of x's columns with A (shrink), the eight partial S are added in the order of the
// blocks, and block c then multiplies S with the c-th part of every B's rows (expand) and adds to y.
//
//     multi_lora_cluster      one launch: the eight blocks are a cluster and read each other's partial S directly
//     multi_lora_shrink, _expand   two launches, for devices without clusters: partial S go through planes in memory
//
// Both run the same sums in the same order, so they give the same bits; a token's bits depend on its own row, its slot,
// K and R, never on the other tokens. Tensor cores multiply x with A in 16 bits; S stays float: B is widened to float
// and S cut into two TF32 terms, which together hold 21 bits. Nothing beyond a slot's true rank is read.
//
// Alphabet: q = lane / 4 and t = lane % 4 place a lane in the tensor cores' tiles; columns of S are ranks of all slices,
// each slice padded to 16; a row of B is a column of y.
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

/// Eight elements, those from `left` on as zeros that are not read. Weights stream past the L1 cache.
template <class T, bool STREAM>
__device__ __forceinline__ uint4 load8(const T* from, int left, bool aligned) {
  uint32_t word[4] = {0, 0, 0, 0};
  if (from != nullptr && left >= 8 && aligned) {
    return STREAM ? ptx::load_streaming(from) : *reinterpret_cast<const uint4*>(from);
  }
  if (from != nullptr) {
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(from);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < left) word[i / 2] |= uint32_t(bits[i]) << (i % 2 * 16);
    }
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

/// partial [columns, TOKENS] = A x over block `part`'s columns of x, in shared memory; `scratch` [WARPS, 16 RB, TOKENS].
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

/// Some rows of one slice's B in shared memory: what expand takes at a time.
struct Chunk {
  int slice, n, rows;  // rows n ... n + rows - 1; `slice` == slice_count: there are no more
  int rank, column;    // true rank, and the slice's first column of S
};

/// The chunk after `c` of block `part`.
__device__ __forceinline__ Chunk next_chunk(const Params& p, const Item& item, int part, Chunk c) {
  c.n += c.rows;
  while (c.slice < p.slice_count && (c.rank == 0 || c.n >= n_begin(p.slices[c.slice], part + 1))) {
    c.column += up16(c.rank);
    if (++c.slice == p.slice_count) break;
    c.rank = true_rank(p.slices[c.slice], item.slot);
    c.n = n_begin(p.slices[c.slice], part);
  }
  if (c.slice < p.slice_count) {
    const int room = STAGE_BYTES / (2 * up16(c.rank)) / 16 * 16;
    c.rows = min(room, n_begin(p.slices[c.slice], part + 1) - c.n);
  }
  return c;
}

__device__ __forceinline__ Chunk first_chunk(const Params& p, const Item& item, int part) {
  const Chunk none = {0, n_begin(p.slices[0], part), 0, true_rank(p.slices[0], item.slot), 0};
  return next_chunk(p, item, part, none);
}

/// Whether a chunk is one piece of memory without columns that must not be read.
__device__ __forceinline__ bool in_one_piece(const Slice& slice, int rank) {
  return slice.aligned_b && rank % 16 == 0 && slice.stride_bn == rank;
}

/// Starts to bring a chunk into `to` [rows, up16(rank)], with zeros past the true rank.
template <class T, bool BULK>
__device__ __forceinline__ void load_chunk(const Params& p, const Item& item, const Chunk& c, T* to, uint64_t* barrier) {
  const Slice& slice = p.slices[c.slice];
  const T* b = static_cast<const T*>(slice.b) + item.slot * slice.stride_bs + c.n * slice.stride_bn;
  if (BULK && in_one_piece(slice, c.rank)) {
    if (threadIdx.x == 0) {
      const uint32_t bytes = c.rows * c.rank * int(sizeof(T));
      ptx::mbarrier_arrive_expect(barrier, bytes);
      ptx::bulk_load(to, b, bytes, barrier);
    }
    return;
  }
  const int pieces = up16(c.rank) / 8;  // of a row, 16 bytes each
  for (int i = threadIdx.x; i < c.rows * pieces; i += THREADS) {
    const int r = i % pieces * 8, left = max(0, min(c.rank - r, 8));
    const T* from = b + i / pieces * slice.stride_bn + (left ? r : 0);
    if (slice.aligned_b) {
      ptx::copy_async_16(to + i * 8, from, left * int(sizeof(T)));
    } else {
      *reinterpret_cast<uint4*>(to + i * 8) = load8<T, false>(from, left, false);
    }
  }
}

/// y += S Bᵀ for a chunk. Tile row q is row 2q of B and q + 8 is 2q + 1, so that a lane adds to adjacent columns of y;
/// of each 16 ranks a lane takes four adjacent ones.
template <class T>
__device__ __forceinline__ void multiply_chunk(const Params& p, const Item& item, const Chunk& c, const T* b,
                                               const float* s) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, q = lane / 4, t = lane % 4;
  const Slice& slice = p.slices[c.slice];
  const int width = up16(c.rank), pitch = s_pitch(p.columns), groups = item.count > 8 ? 2 : 1;
  for (int row = warp * 16 + 2 * q; row - 2 * q < c.rows; row += WARPS * 16) {
    float acc[2][4] = {};
    for (int r = 4 * t; r < width; r += 16) {
      const uint2 even = *reinterpret_cast<const uint2*>(b + row * width + r);
      const uint2 odd = *reinterpret_cast<const uint2*>(b + (row + 1) * width + r);
      const float2 even0 = ptx::unpack<T>(even.x), even1 = ptx::unpack<T>(even.y);
      const float2 odd0 = ptx::unpack<T>(odd.x), odd1 = ptx::unpack<T>(odd.y);
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        if (g < groups) {
          const float4 v = *reinterpret_cast<const float4*>(s + (g * 8 + q) * pitch + c.column + r);
          const float h0 = ptx::tf32(v.x), h1 = ptx::tf32(v.y), h2 = ptx::tf32(v.z), h3 = ptx::tf32(v.w);
          // An infinite S has no rest, which would be NaN.
          const float l0 = h0 == v.x ? 0.f : v.x - h0, l1 = h1 == v.y ? 0.f : v.y - h1;
          const float l2 = h2 == v.z ? 0.f : v.z - h2, l3 = h3 == v.w ? 0.f : v.w - h3;
          ptx::mma_m16n8k8_tf32(acc[g], even0.x, odd0.x, even0.y, odd0.y, l0, l1);
          ptx::mma_m16n8k8_tf32(acc[g], even1.x, odd1.x, even1.y, odd1.y, l2, l3);
          ptx::mma_m16n8k8_tf32(acc[g], even0.x, odd0.x, even0.y, odd0.y, h0, h1);
          ptx::mma_m16n8k8_tf32(acc[g], even1.x, odd1.x, even1.y, odd1.y, h2, h3);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = i / 2 * 8 + 2 * t + i % 2;
      if (token >= item.count || row >= c.rows) continue;
      T* y = static_cast<T*>(slice.y) + p.order[item.first + token] * slice.stride_ym + c.n + row;
      const float first = acc[i / 2][i % 2], second = acc[i / 2][i % 2 + 2];
      if (slice.aligned_y && row + 1 < c.rows) {
        const float2 before = ptx::unpack<T>(*reinterpret_cast<const uint32_t*>(y));
        *reinterpret_cast<uint32_t*>(y) = ptx::pack<T>(before.x + first, before.y + second);
      } else {
        y[0] = T(float(y[0]) + first);
        if (row + 1 < c.rows) y[1] = T(float(y[1]) + second);
      }
    }
  }
}

/// B's first two chunks; what follows is brought into L2, and into shared memory as room is made.
template <class T, bool BULK>
struct Ring {
  uint64_t* barriers;  // [2]
  T* stages;           // [2, STAGE_BYTES]
  Chunk ahead;         // the next to be loaded

  __device__ __forceinline__ T* stage(int i) { return stages + i % 2 * (STAGE_BYTES / int(sizeof(T))); }

  __device__ __forceinline__ void load(const Params& p, const Item& item, int part, int i) {
    if (ahead.slice == p.slice_count) return;
    load_chunk<T, BULK>(p, item, ahead, stage(i), barriers + i % 2);
    ahead = next_chunk(p, item, part, ahead);
  }

  __device__ __forceinline__ void begin(const Params& p, const Item& item, int part) {
    if (BULK && threadIdx.x == 0) {
      ptx::mbarrier_init(barriers, 1);
      ptx::mbarrier_init(barriers + 1, 1);
      ptx::mbarrier_fence_init();
    }
    __syncthreads();
    ahead = first_chunk(p, item, part);
    load(p, item, part, 0);
    load(p, item, part, 1);
    for (Chunk c = ahead; BULK && c.slice < p.slice_count; c = next_chunk(p, item, part, c)) {
      const Slice& slice = p.slices[c.slice];
      const T* b = static_cast<const T*>(slice.b) + item.slot * slice.stride_bs + c.n * slice.stride_bn;
      if (in_one_piece(slice, c.rank)) {
        if (threadIdx.x == 0) ptx::bulk_prefetch_l2(b, c.rows * c.rank * int(sizeof(T)));
      } else if (slice.aligned_b && c.rank >= 8) {
        for (int i = threadIdx.x; i < c.rows; i += THREADS) {
          ptx::bulk_prefetch_l2(b + i * slice.stride_bn, c.rank / 8 * 16);
        }
      }
    }
  }

  /// y += S Bᵀ over all chunks of block `part`.
  __device__ __forceinline__ void expand(const Params& p, const Item& item, int part, const float* s) {
    uint32_t phases = 0;  // bit i: parity of stage i's barrier, which turns only when a bulk copy used it
    Chunk c = first_chunk(p, item, part);
    for (int i = 0; c.slice < p.slice_count; ++i) {
      if (BULK && in_one_piece(p.slices[c.slice], c.rank)) {
        ptx::mbarrier_wait(barriers + i % 2, phases >> i % 2 & 1);
        phases ^= 1u << i % 2;
      } else {
        ptx::copy_async_wait();
        __syncthreads();
      }
      multiply_chunk(p, item, c, stage(i), s);
      if (BULK) ptx::fence_async_shared();  // ordinary writes to the stage come before the bulk copy that follows
      __syncthreads();
      load(p, item, part, i + 2);
      c = next_chunk(p, item, part, c);
    }
  }
};

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
  ptx::cluster_arrive();  // others may still read this block's partial sums: it must not exit before they have
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

// Expand: y += S Bᵀ for a block's part of every slice's B, which comes through shared memory in chunks.
#pragma once
#include "multi_lora_item.cuh"

namespace multi_lora {

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
__device__ __forceinline__ void load_chunk(const Params& p, const Item& item, const Chunk& c, T* to,
                                           uint64_t* barrier) {
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
      ptx::store_shared_16(to + i * 8, load8(from, left));
    }
  }
}

/// Two adjacent elements of y, the second only if `both`; in one access if `aligned`.
__device__ __forceinline__ uint32_t load_pair(const uint16_t* y, bool both, bool aligned) {
  if (both && aligned) return *reinterpret_cast<const uint32_t*>(y);
  return y[0] | (both ? uint32_t(y[1]) << 16 : 0);
}

__device__ __forceinline__ void store_pair(uint16_t* y, uint32_t pair, bool both, bool aligned) {
  if (both && aligned) {
    *reinterpret_cast<uint32_t*>(y) = pair;
    return;
  }
  y[0] = static_cast<uint16_t>(pair);
  if (both) y[1] = static_cast<uint16_t>(pair >> 16);
}

/// S of a token at four adjacent ranks, as two TF32 terms.
struct Terms {
  float high[4], low[4];

  __device__ __forceinline__ explicit Terms(float4 s) {
    const float values[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      high[i] = ptx::tf32(values[i]);
      low[i] = high[i] == values[i] ? 0.f : values[i] - high[i];  // an infinite S has no rest, which would be NaN
    }
  }
};

/// y += S Bᵀ for a chunk. Tile row q is row 2q of B and q + 8 is 2q + 1, so that a lane adds to adjacent columns of y;
/// of each 16 ranks a lane takes four adjacent ones. A warp has two tiles under way: y is asked for before it is
/// needed, and S is cut once for both (four tiles spill on sm_90).
template <class T>
__device__ __forceinline__ void multiply_chunk(const Params& p, const Item& item, const Chunk& c, const T* b,
                                               const float* s) {
  constexpr int TILES = 2, STEP = WARPS * 16;  // rows from one tile of a warp to its next
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, q = lane / 4, t = lane % 4;
  const Slice& slice = p.slices[c.slice];
  const int width = up16(c.rank), pitch = s_pitch(p.columns), groups = item.count > 8 ? 2 : 1;
  uint16_t* y[4];  // of the tokens 2t, 2t + 1, and those 8 further
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int token = i / 2 * 8 + 2 * t + i % 2;
    const int64_t row = token < item.count ? p.order[item.first + token] : 0;
    y[i] = token < item.count ? static_cast<uint16_t*>(slice.y) + row * slice.stride_ym + c.n + 2 * q : nullptr;
  }
  for (int first = warp * 16; first < c.rows; first += TILES * STEP) {
    float acc[TILES][2][4] = {};
    uint32_t before[TILES][4] = {};
#pragma unroll
    for (int j = 0; j < TILES; ++j) {
      const int row = first + j * STEP;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int left = c.rows - row - 2 * q;
        if (left > 0 && y[i] != nullptr) before[j][i] = load_pair(y[i] + row, left > 1, slice.aligned_y);
      }
    }
#pragma unroll 1
    for (int r = 4 * t; r < width; r += 16) {
      const float* column = s + q * pitch + c.column + r;
      const Terms near(*reinterpret_cast<const float4*>(column));
      const Terms far(*reinterpret_cast<const float4*>(column + (groups - 1) * 8 * pitch));
#pragma unroll
      for (int j = 0; j < TILES; ++j) {
        if (first + j * STEP >= c.rows) break;
        const T* even = b + (first + j * STEP + 2 * q) * width + r;
        const uint2 e = *reinterpret_cast<const uint2*>(even), o = *reinterpret_cast<const uint2*>(even + width);
        const float2 e0 = ptx::unpack<T>(e.x), e1 = ptx::unpack<T>(e.y);
        const float2 o0 = ptx::unpack<T>(o.x), o1 = ptx::unpack<T>(o.y);
#pragma unroll
        for (int g = 0; g < 2; ++g) {
          if (g >= groups) break;
          const Terms& terms = g ? far : near;
          ptx::mma_m16n8k8_tf32(acc[j][g], e0.x, o0.x, e0.y, o0.y, terms.low[0], terms.low[1]);
          ptx::mma_m16n8k8_tf32(acc[j][g], e1.x, o1.x, e1.y, o1.y, terms.low[2], terms.low[3]);
          ptx::mma_m16n8k8_tf32(acc[j][g], e0.x, o0.x, e0.y, o0.y, terms.high[0], terms.high[1]);
          ptx::mma_m16n8k8_tf32(acc[j][g], e1.x, o1.x, e1.y, o1.y, terms.high[2], terms.high[3]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < TILES; ++j) {
      const int row = first + j * STEP;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int left = c.rows - row - 2 * q;
        if (left <= 0 || y[i] == nullptr) continue;
        const float2 sum = ptx::unpack<T>(before[j][i]);
        const float* add = acc[j][i / 2] + i % 2;
        store_pair(y[i] + row, ptx::pack<T>(sum.x + add[0], sum.y + add[2]), left > 1, slice.aligned_y);
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
#pragma unroll 1
    for (int i = 0; i < 2; ++i) load(p, item, part, i);
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

}  // namespace multi_lora

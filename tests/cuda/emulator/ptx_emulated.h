// The operations of csrc/ptx.cuh and the few CUDA built-ins that the kernels use, on the machine of machine.h.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "machine.h"

#define threadIdx (emulator::self().index)
#define blockIdx  (emulator::block_index())
inline emulator::Index& gridDim = emulator::grid.grid;
inline emulator::Index& blockDim = emulator::grid.block;
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __cluster_dims__
#define __cluster_dims__(...)
#undef __grid_constant__
#define __grid_constant__

namespace emulator {

inline Index block_index() {
  const uint32_t i = self().block->index;
  return {i % grid.grid.x, i / grid.grid.x % grid.grid.y, i / grid.grid.x / grid.grid.y};
}

inline uint32_t swizzle_128(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

template <class T>
float to_float(uint16_t bits) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return std::bit_cast<float>(uint32_t(bits) << 16);
  else
    return __half2float(__half_raw{bits});
}

/// What a CUtensorMap says here; it lies in the first bytes of the real, opaque type.
struct TensorMap {
  uint8_t* base;
  uint64_t columns, rows, stride;  // elements, elements, bytes
  uint32_t box_columns, box_rows;
};

inline TensorMap read_map(const CUtensorMap* map) {
  TensorMap m;
  memcpy(&m, map, sizeof m);
  if (!m.box_rows || m.box_columns * 2 > 128) throw Fault("TMA: the tensor map was not encoded");
  return m;
}

/// Calls `f(element in global memory or null, element in shared memory)` for every element of a box.
template <class F>
void for_box(const TensorMap& m, uint8_t* shared, uint32_t address, int x, int y, F f) {
  for (int64_t i = 0; i < m.box_rows; ++i) {
    for (int64_t j = 0; j < m.box_columns; ++j) {
      const int64_t row = y + i, column = x + j;
      const bool inside = row >= 0 && column >= 0 && row < int64_t(m.rows) && column < int64_t(m.columns);
      uint8_t* global = inside ? m.base + row * m.stride + column * 2 : nullptr;
      f(global, shared + swizzle_128(address + (i * m.box_columns + j) * 2));
    }
  }
}

inline void check_no_mbarrier(Block& block, uint32_t address, size_t bytes) {
  auto first = block.mbarriers.lower_bound(address);
  if (first != block.mbarriers.end() && first->first < address + bytes)
    throw Fault("TMA: the load overwrites a mbarrier");
}

}  // namespace emulator

using std::max;
using std::min;

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
inline void __syncwarp(unsigned = ~0u) {
  emulator::Unseen unseen;
  emulator::warp_sync("__syncwarp");
}
inline void __syncthreads() {
  emulator::Unseen unseen;
  emulator::arrive_and_wait(emulator::self().block->barriers[0], emulator::grid.block.x, "__syncthreads");
}
inline void __threadfence() {}
inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
inline float __uint_as_float(uint32_t value) { return std::bit_cast<float>(value); }

namespace emulator {
template <class T>
T shuffle(T value, uint32_t from) {
  static_assert(sizeof(T) == 4);
  Unseen unseen;
  auto* lanes = exchange({std::bit_cast<uint32_t>(value)}, "shuffle");
  const uint32_t bits = lanes[from % 32]->exchange[0];
  warp_sync("shuffle");
  return std::bit_cast<T>(bits);
}
}  // namespace emulator

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulator::shuffle(value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::shuffle(value, emulator::self().lane() ^ mask);
}

namespace ptx {

using emulator::Block;
using emulator::Fault;
using emulator::Seen;
using emulator::self;
using emulator::Unseen;

// ---- addresses ------------------------------------------------------------------------------------------------------

inline uint8_t* dynamic_shared() { return self().block->base + Block::START; }
inline uint32_t shared_address(const void* pointer) { return self().block->address(pointer, 0, "shared_address"); }

// ---- mbarrier -------------------------------------------------------------------------------------------------------

inline void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  Unseen unseen;
  const uint32_t address = self().block->address(barrier, 8, "mbarrier_init");
  self().block->mbarriers[address] = {arrivals, arrivals};
}
inline void mbarrier_fence_init() {}
inline void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  Unseen unseen;
  auto& b = self().block->mbarrier(self().block->address(barrier, 8, "mbarrier"));
  b.bytes += bytes;
  emulator::arrive(b);
}
inline void mbarrier_arrive(uint64_t* barrier) { mbarrier_arrive_expect(barrier, 0); }
inline void mbarrier_arrive_cluster(uint64_t* barrier, uint32_t rank) {
  Unseen unseen;
  const uint32_t address = self().block->address(barrier, 8, "mbarrier");
  emulator::arrive(self().block->cluster->blocks.at(rank)->mbarrier(address));
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  Unseen unseen;
  auto& b = self().block->mbarrier(self().block->address(barrier, 8, "mbarrier"));
  emulator::wait_until(b.queue, "mbarrier_wait", [&] { return b.phase != parity; });
  emulator::happens_after(&b);
}

// ---- copies by single threads ---------------------------------------------------------------------------------------

inline void copy_async_16(void* to, const void* from, uint32_t bytes) {
  Unseen unseen;
  const uint32_t address = self().block->address(to, 16, "copy_async_16");
  if (address % 16 || reinterpret_cast<uintptr_t>(from) % 16) throw Fault("copy_async_16: not 16-byte aligned");
  if (bytes > 16) throw Fault("copy_async_16: more than 16 bytes");
  self().copies.push_back([to, from, bytes] {  // as late as the thread allows
    Seen seen;
    memcpy(to, from, bytes);
    memset(static_cast<uint8_t*>(to) + bytes, 0, 16 - bytes);
  });
}
inline void copy_async_wait() {
  Unseen unseen;
  for (auto& copy : self().copies) copy();
  self().copies.clear();
}

// ---- bulk copies ----------------------------------------------------------------------------------------------------

inline void tma_prefetch(const CUtensorMap*) {}
inline void tma_load_multicast(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y, uint16_t blocks) {
  Unseen unseen;
  Block* block = self().block;
  const auto m = emulator::read_map(map);
  const uint32_t bytes = m.box_columns * m.box_rows * 2;
  const uint32_t address = block->address(to, bytes, "tma_load"), flag = block->address(barrier, 8, "mbarrier");
  if (address % 1024) throw Fault("tma_load: a swizzled box must begin at a multiple of 1024 bytes");
  if (!blocks || blocks >> block->cluster->blocks.size()) throw Fault("tma_load: no such block in the cluster");
  for (auto& peer : block->cluster->blocks) {
    if (!(blocks >> peer->rank & 1)) continue;
    Block* into = peer.get();
    emulator::do_later(emulator::asynchronous(block, nullptr, [=] {
      emulator::check_no_mbarrier(*into, address, bytes);
      {
        Seen seen;
        emulator::for_box(m, into->base, address, x, y, [](const uint8_t* global, uint8_t* shared) {
          uint16_t value = 0;
          if (global) memcpy(&value, global, 2);
          memcpy(shared, &value, 2);
        });
      }
      emulator::deliver(into->mbarrier(flag), bytes);
    }));
  }
}
inline void tma_load(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y) {
  tma_load_multicast(to, map, barrier, x, y, 1 << self().block->rank);
}
inline void tma_store(const CUtensorMap* map, const void* from, int x, int y) {
  Unseen unseen;
  Block* block = self().block;
  const auto m = emulator::read_map(map);
  const uint32_t bytes = m.box_columns * m.box_rows * 2, address = block->address(from, bytes, "tma_store");
  if (address % 1024) throw Fault("tma_store: a swizzled box must begin at a multiple of 1024 bytes");
  for (uint32_t unit = address / 16; unit < (address + bytes) / 16; ++unit)
    if (block->unfenced[unit]) throw Fault("tma_store: its source was written without fence_async_shared since");
  self().stores.push_back(emulator::asynchronous(block, &self(), [=] {
    Seen seen;
    emulator::for_box(m, block->base, address, x, y, [](uint8_t* global, const uint8_t* shared) {
      if (global) memcpy(global, shared, 2);
    });
  }));
}
inline void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  Unseen unseen;
  Block* block = self().block;
  const uint32_t address = block->address(to, bytes, "bulk_load"), flag = block->address(barrier, 8, "mbarrier");
  if (address % 16 || bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    throw Fault("bulk_load: not 16-byte aligned");
  emulator::do_later(emulator::asynchronous(block, nullptr, [=] {
    emulator::check_no_mbarrier(*block, address, bytes);
    {
      Seen seen;
      memcpy(block->base + address, from, bytes);
    }
    emulator::deliver(block->mbarrier(flag), bytes);
  }));
}
inline void bulk_prefetch_l2(const void* from, uint32_t bytes) {
  if (bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16) throw Fault("bulk_prefetch_l2: not 16-byte aligned");
}
inline void bulk_commit() {
  Unseen unseen;
  self().batches.push_back(std::move(self().stores));
  self().stores.clear();
}
template <int N>
void bulk_wait_read() {
  Unseen unseen;
  for (auto& batches = self().batches; batches.size() > N; batches.pop_front())
    for (auto& store : batches.front()) store();
  emulator::happens_after(&self());
}
template <int N>
void bulk_wait() {
  bulk_wait_read<N>();
}

// ---- fences and flags -----------------------------------------------------------------------------------------------

inline void fence_async_shared() {
  Unseen unseen;
  for (uint32_t unit : self().wrote)
    if (self().block->unfenced[unit] == self().index.x + 1) self().block->unfenced[unit] = 0;
  self().wrote.clear();
}
inline void fence_async_global() {}
inline uint32_t load_acquire(const uint32_t* flag) {
  Unseen unseen;
  emulator::yield();
  emulator::happens_after(const_cast<uint32_t*>(flag));
  return *flag;
}
inline uint32_t fetch_add(uint32_t* counter, uint32_t value) {
  Unseen unseen;
  emulator::scheduler.idle = 0;
  emulator::happens_after(counter);
  emulator::happens_before(counter);
  const uint32_t before = *counter;
  *counter += value;
  return before;
}
inline void add_release(uint32_t* flag, uint32_t value) {
  Unseen unseen;
  emulator::scheduler.idle = 0;
  emulator::happens_before(flag);
  *flag += value;
}

// ---- synchronisation ------------------------------------------------------------------------------------------------

inline void barrier_sync(int id, int threads) {
  Unseen unseen;
  emulator::arrive_and_wait(self().block->barriers[id], threads, "barrier_sync");
}
inline uint32_t cluster_rank() { return self().block->rank; }
inline void cluster_arrive() {
  Unseen unseen;
  auto& cluster = *self().block->cluster;
  auto& barrier = cluster.barrier;
  self().cluster_generation = barrier.generation;
  emulator::happens_before(&barrier);
  if (++barrier.arrived < cluster.blocks.size() * emulator::grid.block.x) return;
  barrier.arrived = 0;
  ++barrier.generation;
  emulator::notify(barrier.queue);
}
inline void cluster_wait() {
  Unseen unseen;
  auto& barrier = self().block->cluster->barrier;
  const uint32_t generation = self().cluster_generation;
  emulator::wait_until(barrier.queue, "cluster_wait", [&] { return barrier.generation != generation; });
  emulator::happens_after(&barrier);
}
inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
template <class T>
T* cluster_map(T* pointer, uint32_t rank) {
  Block& peer = *self().block->cluster->blocks.at(rank);
  if (!peer.threads_alive) throw Fault("cluster_map: that block has finished");
  return reinterpret_cast<T*>(peer.base + self().block->address(pointer, sizeof(T), "cluster_map"));
}
inline void dependency_wait() {
  Unseen unseen;
  auto& ahead = emulator::settings.kernel_ahead;
  if (!ahead) return;
  if (++emulator::waiting_for_ahead == emulator::scheduler.alive) {
    emulator::scheduler.pending.push_back([&ahead] {
      std::exchange(ahead, {})();
      emulator::notify(emulator::behind);
    });
  }
  emulator::wait_until(emulator::behind, "dependency_wait", [&] { return !ahead; });
}
inline void dependents_launch() {}

template <int N>
void registers_decrease() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
  Unseen unseen;
  self().block->registers[self().index.x / 128] = N;
  int total = 0;
  for (int used : self().block->registers) total += 128 * used;
  if (total > 65536) throw Fault("setmaxnreg: more registers than a multiprocessor has");
}
template <int N>
void registers_increase() {
  registers_decrease<N>();
}

// ---- warp matrices --------------------------------------------------------------------------------------------------

template <class T>
uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162_raw pair = __floats2bfloat162_rn(low, high);
    return pair.x | uint32_t(pair.y) << 16;
  } else {
    const __half2_raw pair = __floats2half2_rn(low, high);
    return pair.x | uint32_t(pair.y) << 16;
  }
}
template <class T>
float2 unpack(uint32_t packed) {
  return {emulator::to_float<T>(packed & 0xffff), emulator::to_float<T>(packed >> 16)};
}

template <class T>
void mma_m16n8k16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  Unseen unseen;
  auto* lanes = emulator::exchange({a0, a1, a2, a3, b0, b1}, "mma");
  auto element = [&](int lane, int reg, int half) {
    return emulator::to_float<T>(lanes[lane]->exchange[reg] >> 16 * half & 0xffff);
  };
  const int g = self().lane() / 4, t = self().lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int m = g + i / 2 * 8, n = t * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const float a = element(m % 8 * 4 + k % 8 / 2, m / 8 + k / 8 * 2, k % 2);
      const float b = element(n * 4 + k % 8 / 2, 4 + k / 8, k % 2);
      c[i] += a * b;
    }
  }
  emulator::warp_sync("mma");
}

inline float tf32(float value) { return __uint_as_float(__float_as_uint(value) & 0xffffe000u); }

inline void mma_m16n8k8_tf32(float (&c)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
  Unseen unseen;
  auto bits = [](float value) { return __float_as_uint(tf32(value)); };
  auto* lanes = emulator::exchange({bits(a0), bits(a1), bits(a2), bits(a3), bits(b0), bits(b1)}, "mma");
  const int g = self().lane() / 4, t = self().lane() % 4;
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 8; ++k) {
      const float a = __uint_as_float(lanes[g * 4 + k % 4]->exchange[i / 2 + k / 4 * 2]);
      const float b = __uint_as_float(lanes[(t * 2 + i % 2) * 4 + k % 4]->exchange[4 + k / 4]);
      c[i] += a * b;
    }
  }
  emulator::warp_sync("mma");
}

inline void stmatrix_x4(void* row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  Unseen unseen;
  Block& block = *self().block;
  const uint32_t address = block.address(row, 16, "stmatrix");
  if (address % 16) throw Fault("stmatrix: a row is not 16-byte aligned");
  auto* lanes = emulator::exchange({address}, "stmatrix");
  const uint32_t lane = self().lane(), values[4] = {r0, r1, r2, r3};
  for (int i = 0; i < 4; ++i) {
    const uint32_t to = lanes[i * 8 + lane / 4]->exchange[0];
    block.unfenced[to / 16] = self().index.x + 1;
    self().wrote.push_back(to / 16);
    Seen seen;
    memcpy(block.base + to + lane % 4 * 4, &values[i], 4);
  }
  emulator::warp_sync("stmatrix");
}

inline uint4 load_streaming(const void* from) { return *static_cast<const uint4*>(from); }

}  // namespace ptx

#include "wgmma_emulated.h"

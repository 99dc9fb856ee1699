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

#include "grid.h"

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

/// This thread wrote the 16 bytes at `address` of its shared memory, as ordinary stores do.
inline void wrote_shared(uint32_t address) {
  self().block->unfenced[address / 16] = self().index.x + 1;
  self().wrote.push_back(address / 16);
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
  emulator::self().waited = false;
}
inline void __syncthreads() {
  emulator::Unseen unseen;
  emulator::aligned("__syncthreads");
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
inline void mbarrier_fence_init() {
  for (auto& [address, barrier] : self().block->mbarriers) barrier.shown = true;
}
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
  emulator::arrive(self().block->cluster->blocks.at(rank)->shown_mbarrier(address));
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  Unseen unseen;
  auto& b = self().block->mbarrier(self().block->address(barrier, 8, "mbarrier"));
  emulator::wait_until(b.queue, "mbarrier_wait", [&] { return b.phase != parity; });
  self().waited = true;
  emulator::happens_after(&b);
}

// ---- fences and flags -----------------------------------------------------------------------------------------------

inline void fence_async_shared() {
  Unseen unseen;
  for (uint32_t unit : self().wrote)
    if (self().block->unfenced[unit] == self().index.x + 1) self().block->unfenced[unit] = 0;
  self().wrote.clear();
}
inline void fence_async_global() {
  Unseen unseen;
  self().proxy_fence = ++emulator::grid.proxy_fences;
  for (uintptr_t address : self().stored) {
    auto& stored = emulator::grid.stored.at(address);
    if (stored.by == &self()) stored.fenced = self().proxy_fence;
  }
  self().stored.clear();
}
inline void store_global(uint16_t* to, uint16_t value) {
  *to = value;
  Unseen unseen;
  emulator::grid.stored[reinterpret_cast<uintptr_t>(to)] = {&self(), 0};
  self().stored.push_back(reinterpret_cast<uintptr_t>(to));
}
inline void store_shared_16(void* to, uint4 value) {
  {
    Unseen unseen;
    emulator::wrote_shared(self().block->address(to, 16, "store_shared_16"));
  }
  *static_cast<uint4*>(to) = value;
}
inline uint32_t load_relaxed(const uint32_t* flag) {
  Unseen unseen;
  self().waited = true;
  emulator::yield();
  return *flag;
}
inline uint32_t load_acquire(const uint32_t* flag) {
  Unseen unseen;
  self().waited = true;
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
  emulator::aligned("barrier_sync", id);
  emulator::arrive_and_wait(self().block->barriers[id], threads, "barrier_sync");
}
inline uint32_t cluster_rank() { return self().block->rank; }
inline void cluster_arrive_relaxed() {
  Unseen unseen;
  emulator::aligned("cluster_arrive");
  auto& cluster = *self().block->cluster;
  auto& barrier = cluster.barrier;
  self().cluster_generation = barrier.generation;
  if (++barrier.arrived < cluster.blocks.size() * emulator::grid.block.x) return;
  barrier.arrived = 0;
  ++barrier.generation;
  emulator::notify(barrier.queue);
}
inline void cluster_arrive() {
  emulator::happens_before(&self().block->cluster->barrier);
  cluster_arrive_relaxed();
}
inline void cluster_wait() {
  Unseen unseen;
  emulator::aligned("cluster_wait");
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
  Block& block = *self().block;
  emulator::aligned("setmaxnreg.dec");
  emulator::warp_sync("setmaxnreg.dec", [&] {
    int& registers = block.warps[self().warp()].registers;
    if (N > registers) throw Fault("setmaxnreg.dec: to more registers than the warp has");
    block.free_registers += 32 * (registers - N);
    registers = N;
    emulator::notify(block.wanting_registers);
  });
}
template <int N>
void registers_increase() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
  Unseen unseen;
  Block& block = *self().block;
  emulator::aligned("setmaxnreg.inc");
  emulator::warp_sync("setmaxnreg.inc", [&] {
    int& registers = block.warps[self().warp()].registers;
    if (N < registers) throw Fault("setmaxnreg.inc: to fewer registers than the warp has");
    const int more = 32 * (N - registers);
    emulator::wait_until(block.wanting_registers, "setmaxnreg.inc", [&] { return block.free_registers >= more; });
    block.free_registers -= more;
    registers = N;
  });
}

}  // namespace ptx

#include "copies_emulated.h"
#include "matrices_emulated.h"
#include "wgmma_emulated.h"

// Named operations of the Hopper kernels: each is one PTX instruction, or a few, and nothing else.
//
// Kernels reach the machine only through this header, so that the same source also runs on a CPU: with
// FASTPEFT_EMULATOR defined, the same names come from tests/cuda/emulator/. An operation added here is added there.
// Shared-memory arguments are ordinary pointers; strides and counts are in bytes.
#pragma once
#ifdef FASTPEFT_EMULATOR
#include "ptx_emulated.h"
#else
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "wgmma.cuh"

namespace ptx {

#define PTX __device__ __forceinline__

// ---- addresses ------------------------------------------------------------------------------------------------------

/// The dynamic shared memory of the block; 16-byte aligned, no more.
PTX uint8_t* dynamic_shared() {
  extern __shared__ __align__(16) uint8_t dynamic_shared_memory[];
  return dynamic_shared_memory;
}

PTX uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

// ---- mbarrier -------------------------------------------------------------------------------------------------------

PTX void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

/// Makes initialised barriers visible to the other blocks of the cluster and to asynchronous copies.
PTX void mbarrier_fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

/// Arrives, and announces `bytes` that asynchronous copies will deliver in this phase.
PTX void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

PTX void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

/// Arrives at the barrier that lies at the same place in block `rank` of the cluster. Says that reading is over: it
/// publishes no writes, and with `.release.cluster` it would wait for a fence across the whole GPU.
PTX void mbarrier_arrive_cluster(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

/// Waits until the phase of this parity is over; of a fresh barrier, the phase of parity 1 counts as over.
PTX void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra WAIT_%=;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---- copies by single threads (sm_80) -------------------------------------------------------------------------------

/// Copies `bytes` (at most 16) into shared memory and fills 16 up with zeros; both addresses are multiples of 16.
PTX void copy_async_16(void* to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}

/// Waits for all of this thread's copies; others see them after a barrier.
PTX void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---- bulk copies (the asynchronous proxy) ---------------------------------------------------------------------------

PTX void tma_prefetch(const CUtensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

/// Loads the box at column `x`, row `y` of the map; what lies outside the tensor arrives as zeros and counts as bytes.
PTX void tma_load(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}

/// The same box into every block of the cluster whose bit is set in `blocks`, at the same place, on its own barrier.
PTX void tma_load_multicast(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "h"(blocks)
      : "memory");
}

/// Stores a box; what lies outside the tensor is not written. Commit, then wait before the source is written again.
PTX void tma_store(const CUtensorMap* map, const void* from, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(shared_address(from)), "r"(x), "r"(y)
               : "memory");
}

/// Loads `bytes` contiguous bytes; the addresses and the count are multiples of 16.
PTX void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

/// Fetches into L2; the address and the count are multiples of 16.
PTX void bulk_prefetch_l2(const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

PTX void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

/// Waits until at most N of this thread's groups of stores have yet to read their source.
template <int N>
PTX void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

/// Waits until at most N of this thread's groups of stores have yet to be written.
template <int N>
PTX void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}

// ---- fences and flags -----------------------------------------------------------------------------------------------

/// Orders this thread's ordinary accesses to shared memory before asynchronous copies that follow.
PTX void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// The same for global memory.
PTX void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

/// Stores to global memory what asynchronous copies will read, after that fence.
PTX void store_global(uint16_t* to, uint16_t value) { *to = value; }

/// Stores 16 bytes to shared memory that asynchronous copies will read or overwrite, after fence_async_shared.
PTX void store_shared_16(void* to, uint4 value) { *static_cast<uint4*>(to) = value; }

/// For a loop that waits: orders nothing.
PTX uint32_t load_relaxed(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

PTX uint32_t load_acquire(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

PTX void add_release(uint32_t* flag, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

/// Adds with acquire and release; returns the value before.
PTX uint32_t fetch_add(uint32_t* counter, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
  return before;
}

// ---- synchronisation ------------------------------------------------------------------------------------------------

/// Barrier `id` (1 to 15; 0 is __syncthreads) for `threads` threads of the block.
PTX void barrier_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

PTX uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

PTX void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
/// Says that this thread has read what it wanted to; what it wrote need not be seen, so no fence is waited for.
PTX void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
PTX void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

PTX void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

/// Where a shared-memory pointer of this block lies in block `rank` of the cluster; good for ordinary loads and stores.
template <class T>
PTX T* cluster_map(T* pointer, uint32_t rank) {
  uint64_t mapped;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(pointer), "r"(rank));
  return reinterpret_cast<T*>(mapped);
}

/// Waits for the kernels before this one in the stream (programmatic dependent launch); at once without one.
PTX void dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

/// Lets the next kernel of the stream start; what it reads of ours it must wait for.
PTX void dependents_launch() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

/// Gives registers of the warpgroup back, down to N a thread.
template <int N>
PTX void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

/// Waits for registers that others gave back, up to N a thread.
template <int N>
PTX void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// ---- loads ----------------------------------------------------------------------------------------------------------

/// 16 bytes that nobody writes during the kernel and that this block will not read again.
PTX uint4 load_streaming(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

// ---- warpgroup matrices (see also wgmma.cuh) ------------------------------------------------------------------------

/// Orders register and shared-memory accesses before the wgmma that follow.
PTX void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
PTX void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/// Waits until at most N committed groups of the warpgroup are unfinished.
template <int N>
PTX void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

/// Tells the compiler that the registers change here: an unfinished wgmma writes them without its knowledge.
template <int N>
PTX void pin_registers(float (&registers)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

}  // namespace ptx

#include "matrices.cuh"
#undef PTX
#endif

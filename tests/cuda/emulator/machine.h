// The emulated GPU: what a block, a cluster and a grid are. grid.h runs a kernel's own source on them.
//
// Modelled, each as unkindly as the programming model allows:
//   threads       scheduled in random order, seeded; a hang is a fault that names who waits for what
//   TMA           boxes, 128-byte swizzle, zero fill outside, multicast, byte counts; loads land in any order, half of
//                 them only when nobody can go on without; and a store reads its source as late as its thread allows
//                 (wait_group, or the kernel's end)
//   mbarrier      phases, arrivals, byte counts; arriving too often, or in an unknown or finished place, is a fault
//   wgmma         through its shared-memory descriptors, both operand orders; done warp by warp, each as late as its
//                 own wait_group allows: a warp knows nothing of the other three; wgmma_fence must follow each wait
//   convergence   operations that PTX calls aligned: all 32 lanes execute the same ones, and none comes later than the
//                 others because it had to wait meanwhile; compilers often bring warps together, and promise nothing
//   setmaxnreg    by whole warpgroups, from a pool of what the launch gave; who wants more than is left, waits
//   proxy fence   shared memory written by stmatrix, cp.async or store_shared_16 and then read or overwritten by a bulk
//                 copy, and global memory written by store_global and then read by TMA, want fence.proxy.async
//   mma.sync, stmatrix, named barriers, clusters, distributed shared memory, mbarrier_fence_init
//   griddepcontrol  the kernel ahead is over only when all threads wait for it
//   residency     run_grid can keep most clusters waiting until the first have left (`resident`)
//
// Assumed:
//   - products are summed in float, in order of k; the tensor core's own order and truncation differ;
//   - memory is sequentially consistent and flags take effect at once.
// Not seen: missing memory fences or too weak an order between threads other than by ThreadSanitizer (which takes each
// operation here to order as its PTX says), proxy fences around other stores, shared-memory bank conflicts,
// instruction-level constraints that ptxas checks, and speed.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <tuple>

#include "fibers.h"

namespace emulator {

struct Barrier {
  uint32_t arrived = 0, generation = 0;
  Queue queue;
};

struct Mbarrier {
  uint32_t arrivals, pending, phase = 0;
  int64_t bytes = 0;
  bool shown = false;  // to other blocks and to copies, by mbarrier_fence_init
  Queue queue;
};

/// What lanes do together. `what` and `trace` are those of the first lane to come, which the others must share.
struct Warp {
  Barrier barrier;
  const char* what = nullptr;
  uint64_t trace = 0;
  uint32_t left = 0;  // lanes that have finished
  int registers = 0;  // of each lane
};

/// One wgmma instruction, as one thread issued it.
struct WgmmaCall {
  void (*run)(uint32_t warp, const std::vector<WgmmaCall*>& lanes);
  float* d;
  uint64_t a, b;
  bool accumulate;
};

/// Four warps, which must issue the same wgmma in the same order, however far one is ahead of another.
struct Warpgroup {
  std::vector<std::tuple<uint64_t, uint64_t, bool>> calls;
  size_t done[4] = {};  // of the calls, by each warp

  void compare(uint32_t warp, const WgmmaCall& call) {
    const std::tuple issued = {call.a, call.b, call.accumulate};
    if (done[warp] == calls.size()) calls.push_back(issued);
    if (calls[done[warp]++] != issued) throw Fault("wgmma: the warpgroup has diverged");
  }
  bool together() const {
    return std::all_of(done, done + 4, [&](size_t n) { return n == calls.size(); });
  }
};

struct Cluster;
struct Thread;

struct Block {
  static constexpr int START = 16;  // where dynamic shared memory begins: only 16-byte alignment is promised

  Cluster* cluster;
  uint32_t index, rank, threads_alive;
  size_t bytes;
  std::unique_ptr<uint8_t[]> storage;
  uint8_t* base;                           // address 0 of shared memory, 1024-byte aligned; the kernel's begins at 16
  std::map<uint32_t, Mbarrier> mbarriers;  // by address
  std::map<int, Barrier> barriers;         // named
  std::vector<uint32_t> unfenced;          // for every 16 bytes, who wrote them without a proxy fence since (+ 1)
  std::vector<Thread*> threads;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  int free_registers = 0;  // given back by setmaxnreg
  Queue wanting_registers;
  void* copies = nullptr;  // ThreadSanitizer's name for this block's asynchronous copies

  /// The shared-memory address of `size` bytes at `pointer`.
  uint32_t address(const void* pointer, size_t size, const char* what) const {
    auto at = static_cast<const uint8_t*>(pointer) - base;
    if (at < START || static_cast<size_t>(at) + size > START + bytes)
      throw Fault(std::string(what) + ": not in this block's shared memory");
    return static_cast<uint32_t>(at);
  }

  Mbarrier& mbarrier(uint32_t address) {
    auto found = mbarriers.find(address);
    if (found == mbarriers.end()) throw Fault("mbarrier: used before it was initialised");
    if (!threads_alive) throw Fault("mbarrier: its block has finished");
    return found->second;
  }
  Mbarrier& shown_mbarrier(uint32_t address) {
    if (!mbarrier(address).shown) throw Fault("mbarrier: a copy or another block uses it before mbarrier_fence_init");
    return mbarrier(address);
  }
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  Barrier barrier;
  size_t threads_alive = 0;
};

struct Index {
  uint32_t x = 1, y = 1, z = 1;
};

struct Thread {
  Index index;
  Block* block = nullptr;
  std::vector<WgmmaCall> open;                             // not committed
  std::deque<std::vector<WgmmaCall>> groups;               // committed, not yet waited for
  std::vector<std::function<void()>> stores;               // not committed
  std::deque<std::vector<std::function<void()>>> batches;  // committed, their source not yet read
  std::vector<std::function<void()>> copies;               // by this thread, not waited for
  std::vector<uint32_t> wrote;                             // 16-byte units of shared memory, since the last proxy fence
  uint32_t exchange[8] = {};                               // what a warp-wide operation shows to the other lanes
  uint32_t cluster_generation = 0;
  uint64_t trace = 0;             // which aligned operations it executed, and whether it had waited before them
  bool waited = false;            // for other threads or copies, since its warp last came together
  bool fenced = false;            // by wgmma_fence, since registers of wgmma may have been touched
  uint64_t proxy_fence = 0;       // when fence_async_global was last executed
  std::vector<uintptr_t> stored;  // addresses in global memory, since then
  std::unique_ptr<Fiber> fiber;

  uint32_t lane() const { return index.x % 32; }
  uint32_t warp() const { return index.x / 32; }
};

/// Of an element in global memory that `by` stored: when its proxy fence came after that; 0 as long as it has not.
struct Stored {
  const Thread* by;
  uint64_t fenced;
};

struct Grid {
  Index grid, block;
  std::map<uintptr_t, Stored> stored;  // by address; the end of a kernel fences everything
  uint64_t proxy_fences = 0;
  std::vector<std::unique_ptr<Cluster>> clusters;
};
inline Grid grid;

struct Settings {
  uint64_t seed = 1;                   // of the order in which threads and copies run
  size_t resident = SIZE_MAX;          // how many clusters the machine holds at a time
  int clusters = 2;                    // how many it says it holds
  std::function<void()> kernel_ahead;  // of the next grid; is over only when all threads wait for it
};
inline Settings settings;
inline size_t waiting_for_ahead = 0;
inline Queue behind;  // who waits for the kernel ahead

inline Thread& self() { return *static_cast<Thread*>(scheduler.current->user); }

/// The kernel's own barrier for `count` threads, or a warp's.
inline void arrive_and_wait(Barrier& barrier, uint32_t count, const char* what,
                            const std::function<void()>& last = {}) {
  const uint32_t generation = barrier.generation;
  happens_before(&barrier);
  if (++barrier.arrived == count) {
    happens_after(&barrier);
    if (last) last();
    happens_before(&barrier);
    barrier.arrived = 0;
    ++barrier.generation;
    notify(barrier.queue);
  } else {
    wait_until(barrier.queue, what, [&] { return barrier.generation != generation; });
  }
  happens_after(&barrier);
}

/// An operation that PTX calls aligned: all lanes of a warp execute it, together. A lane that had to wait since its
/// warp last came together (`__syncwarp`, a shuffle), where others had not, comes later than they. Found out when the
/// lanes meet the next time, or at their end.
inline void aligned(const char* what, uint64_t detail = 0) {
  Thread& me = self();
  for (uint64_t value : {uint64_t(reinterpret_cast<uintptr_t>(what)), detail, uint64_t(me.waited)})
    me.trace = (me.trace ^ value) * 0x9E3779B97F4A7C15 + (me.trace >> 29);
}

inline void compare_lanes(Warp& warp, bool first, const char* what) {
  if (first) warp.what = what, warp.trace = self().trace;
  if (std::string(warp.what) != what) throw Fault(std::string(what) + ": other lanes are at " + warp.what);
  if (warp.trace != self().trace) throw Fault(std::string(what) + ": the warp had not converged before");
}

/// All lanes of the warp; the last one does `last`.
inline void warp_sync(const char* what, const std::function<void()>& last = {}) {
  Warp& warp = self().block->warps[self().warp()];
  compare_lanes(warp, !warp.barrier.arrived, what);
  arrive_and_wait(warp.barrier, 32, what, last);
}

/// The lanes of this thread's warp, after all of them have shown `values`.
inline Thread* const* exchange(std::initializer_list<uint32_t> values, const char* what) {
  Thread& me = self();
  std::copy(values.begin(), values.end(), me.exchange);
  warp_sync(what);
  return &me.block->threads[me.warp() * 32];
}

inline void complete(Mbarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  barrier.pending = barrier.arrivals;
  barrier.phase ^= 1;
  notify(barrier.queue);
}

inline void arrive(Mbarrier& barrier) {
  if (!barrier.pending) throw Fault("mbarrier: more arrivals in a phase than it was initialised with");
  --barrier.pending;
  happens_before(&barrier);
  complete(barrier);
}

inline void deliver(Mbarrier& barrier, int64_t bytes) {
  barrier.bytes -= bytes;
  happens_before(&barrier);
  complete(barrier);
}

/// Work of an asynchronous unit on behalf of `block`; what its issuer did before is visible to it, and what it did
/// to whoever waits for `done`, if that is given.
inline std::function<void()> asynchronous(Block* block, void* done, std::function<void()> work) {
  auto issued = std::make_shared<char>();
  happens_before(issued.get());
  return [=] {
    void* here = tsan_here();
    tsan_switch(block->copies);
    {
      Unseen unseen;
      happens_after(issued.get());
      work();
      if (done) happens_before(done);
    }
    tsan_switch(here);
  };
}

}  // namespace emulator

// The emulated GPU: what a block, a cluster and a grid are, and run_grid, which runs a kernel's own source on them.
//
// Modelled, each as unkindly as the programming model allows:
//   threads       scheduled in random order, seeded; a hang is a fault that names who waits for what
//   TMA           boxes, 128-byte swizzle, zero fill outside, multicast, byte counts; loads land in any order, half of
//                 them only when nobody can go on without; and a store reads its source as late as its thread allows
//                 (wait_group, or the kernel's end)
//   mbarrier      phases, arrivals, byte counts; arriving too often, or in an unknown or finished place, is a fault
//   wgmma         through its shared-memory descriptors, both operand orders; done warp by warp, each as late as its own
//                 wait_group allows: a warp knows nothing of the other three
//   mma.sync, stmatrix, named barriers, clusters, distributed shared memory, setmaxnreg's register budget
//   proxy fence   shared memory written by stmatrix and stored by TMA without fence.proxy.async is a fault
//   griddepcontrol  the kernel ahead is over only when all threads wait for it
//   residency     run_grid can keep most clusters waiting until the first have left (`resident`)
//
// Assumed:
//   - products are summed in float, in order of k; the tensor core's own order and truncation differ;
//   - memory is sequentially consistent and flags take effect at once.
// Not seen: missing memory fences or too weak an order between threads other than by ThreadSanitizer (which takes each
// operation here to order as its PTX says), proxy fences around ordinary stores, shared-memory bank conflicts,
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
  Queue queue;
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
  bool together() const { return std::all_of(done, done + 4, [&](size_t n) { return n == calls.size(); }); }
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
  std::vector<Warpgroup> warpgroups;
  std::vector<int> registers;  // by warpgroup, after setmaxnreg
  void* copies = nullptr;      // ThreadSanitizer's name for this block's asynchronous copies

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
  std::unique_ptr<Fiber> fiber;

  uint32_t lane() const { return index.x % 32; }
  uint32_t warp() const { return index.x / 32; }
};

struct Grid {
  Index grid, block;
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

enum : int { WARPS = 1000 };  // the names of barriers that PTX does not name: a warp each from here on

inline void warp_sync(const char* what) { arrive_and_wait(self().block->barriers[WARPS + self().warp()], 32, what); }

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

inline void finish_thread(Thread& me) {
  if (!me.open.empty() || !me.groups.empty()) throw Fault("exit: wgmma still unfinished");
  if (!me.stores.empty() || !me.batches.empty()) throw Fault("exit: bulk stores still read shared memory");
  if (!me.copies.empty()) throw Fault("exit: asynchronous copies still unfinished");
  if (!--me.block->threads_alive)
    for (const Warpgroup& warpgroup : me.block->warpgroups)
      if (!warpgroup.together()) throw Fault("wgmma: the warpgroup has diverged");
  --me.block->cluster->threads_alive;
}

template <class Body>
std::unique_ptr<Cluster> start_cluster(uint32_t first, uint32_t blocks, uint32_t threads, size_t bytes, Body body) {
  auto cluster = std::make_unique<Cluster>();
  cluster->threads_alive = static_cast<size_t>(blocks) * threads;
  for (uint32_t rank = 0; rank < blocks; ++rank) {
    auto block = std::make_unique<Block>();
    block->cluster = cluster.get();
    block->index = first + rank;
    block->rank = rank;
    block->threads_alive = threads;
    block->bytes = bytes;
    block->storage = std::make_unique<uint8_t[]>(bytes + 2048);
    const auto address = reinterpret_cast<uintptr_t>(block->storage.get());
    block->base = block->storage.get() + ((address + 1023) / 1024 * 1024 - address);
    memset(block->base + Block::START, 0xff, bytes);  // NaN
    block->unfenced.assign(bytes / 16 + 2, 0);
    block->warpgroups.resize((threads + 127) / 128);
    block->registers.assign((threads + 127) / 128, 0);
    block->copies = tsan_create();
    cluster->blocks.push_back(std::move(block));
  }
  for (auto& block : cluster->blocks) {
    for (uint32_t x = 0; x < threads; ++x) {
      auto thread = new Thread;
      thread->index = {x, 0, 0};
      thread->block = block.get();
      thread->fiber = std::make_unique<Fiber>([thread, body] {
        body();
        Unseen unseen;
        finish_thread(*thread);
      });
      thread->fiber->user = thread;
      block->threads.push_back(thread);
      scheduler.ready.push_back(thread->fiber.get());
      ++scheduler.alive;
    }
  }
  return cluster;
}

inline void free_cluster(Cluster& cluster) {
  for (auto& block : cluster.blocks) {
    for (Thread* thread : block->threads) delete thread;
    tsan_destroy(block->copies);
  }
}

inline std::string who_waits() {
  std::map<std::string, int> waiting;
  for (auto& cluster : grid.clusters)
    for (auto& block : cluster->blocks)
      for (Thread* thread : block->threads)
        if (thread->fiber->waits_for) ++waiting[thread->fiber->waits_for];
  std::string text;
  for (auto& [what, count] : waiting) text += std::to_string(count) + " threads at " + what + "; ";
  return text;
}

/// Runs `kernel(args...)` on `blocks` (x, y, z) blocks, in clusters of `cluster` along x, of `threads` threads with
/// `bytes` of dynamic shared memory. Throws Fault.
template <class Kernel, class... Args>
void run_grid(Kernel kernel, Index blocks, uint32_t cluster, uint32_t threads, size_t bytes, Args... args) {
  Unseen unseen;
  scheduler = Scheduler{};
  waiting_for_ahead = 0;
  behind.clear();
  scheduler.seed = settings.seed * 0x9E3779B97F4A7C15 | 1;
  grid = Grid{blocks, {threads, 1, 1}, {}};
  const uint32_t total = blocks.x * blocks.y * blocks.z;
  if (!total || blocks.x % cluster) throw Fault("run_grid: the grid is empty, or no multiple of the cluster");
  uint32_t next = 0;
  auto body = [&kernel, arguments = std::make_tuple(args...)] {
    Seen seen;
    std::apply(kernel, arguments);
  };
  auto refill = [&] {
    std::erase_if(grid.clusters, [](auto& c) { return !c->threads_alive ? (free_cluster(*c), true) : false; });
    for (; next < total && grid.clusters.size() < settings.resident; next += cluster)
      grid.clusters.push_back(start_cluster(next, cluster, threads, bytes, body));
  };
  try {
    run_all(refill, who_waits);
  } catch (...) {
    for (auto& c : grid.clusters) free_cluster(*c);
    grid.clusters.clear();
    throw;
  }
}

}  // namespace emulator

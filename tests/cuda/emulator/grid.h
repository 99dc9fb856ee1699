// How a grid runs on the machine of machine.h: threads begin and end, clusters come and go.
#pragma once
#include "machine.h"

namespace emulator {

inline void finish_thread(Thread& me) {
  Warp& warp = me.block->warps[me.warp()];
  compare_lanes(warp, !warp.left++, "exit");
  if (!me.open.empty() || !me.groups.empty()) throw Fault("exit: wgmma still unfinished");
  if (!me.stores.empty() || !me.batches.empty()) throw Fault("exit: bulk stores still read shared memory");
  if (!me.copies.empty()) throw Fault("exit: asynchronous copies still unfinished");
  if (!--me.block->threads_alive) {
    for (const Warpgroup& warpgroup : me.block->warpgroups)
      if (!warpgroup.together()) throw Fault("wgmma: the warpgroup has diverged");
    for (size_t i = 0; i < me.block->warps.size(); ++i)
      if (me.block->warps[i].registers != me.block->warps[i / 4 * 4].registers)
        throw Fault("setmaxnreg: not by the whole warpgroup");
  }
  --me.block->cluster->threads_alive;
}

/// What ptxas gives a thread of a kernel that has a multiprocessor's 65,536 registers to itself.
inline int registers_at_launch(uint32_t threads) { return std::min(255u, 65536 / threads / 8 * 8); }

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
    block->warps.resize((threads + 31) / 32);
    for (Warp& warp : block->warps) warp.registers = registers_at_launch(threads);
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
  grid = Grid{blocks, {threads, 1, 1}};
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

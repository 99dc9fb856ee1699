// Asynchronous copies: cp.async, TMA and bulk copies. Included by ptx_emulated.h.
#pragma once

namespace emulator {

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

inline void check_fenced(const Block& block, uint32_t address, size_t bytes, const char* what) {
  for (uint32_t unit = address / 16; unit < (address + bytes) / 16; ++unit)
    if (block.unfenced[unit]) throw Fault(std::string(what) + ": on what was written without fence_async_shared since");
}

/// What this thread makes TMA read: whoever stored it must have executed a proxy fence, and then this thread too.
inline void check_fenced(const TensorMap& m, int x, int y) {
  if (grid.stored.empty()) return;
  const int64_t last = std::min<int64_t>(m.columns, int64_t(x) + m.box_columns);
  for (int64_t row = std::max(0, y); row < std::min<int64_t>(m.rows, int64_t(y) + m.box_rows); ++row) {
    const auto start = reinterpret_cast<uintptr_t>(m.base) + row * m.stride;
    for (auto at = grid.stored.lower_bound(start + 2 * std::max(0, x)); at != grid.stored.end(); ++at) {
      if (at->first >= start + 2 * last) break;
      if (!at->second.fenced) throw Fault("tma_load: of what was stored without fence_async_global since");
      if (at->second.fenced > self().proxy_fence) throw Fault("tma_load: no fence_async_global since it was stored");
    }
  }
}

inline void check_no_mbarrier(Block& block, uint32_t address, size_t bytes) {
  auto first = block.mbarriers.lower_bound(address);
  if (first != block.mbarriers.end() && first->first < address + bytes)
    throw Fault("TMA: the load overwrites a mbarrier");
}

}  // namespace emulator

namespace ptx {

// ---- copies by single threads ---------------------------------------------------------------------------------------

inline void copy_async_16(void* to, const void* from, uint32_t bytes) {
  Unseen unseen;
  const uint32_t address = self().block->address(to, 16, "copy_async_16");
  if (address % 16 || reinterpret_cast<uintptr_t>(from) % 16) throw Fault("copy_async_16: not 16-byte aligned");
  if (bytes > 16) throw Fault("copy_async_16: more than 16 bytes");
  self().copies.push_back([to, from, bytes, address] {  // as late as the thread allows
    emulator::wrote_shared(address);
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
  emulator::check_fenced(m, x, y);
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
      emulator::deliver(into->shown_mbarrier(flag), bytes);
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
  emulator::check_fenced(*block, address, bytes, "tma_store");
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
  emulator::check_fenced(*block, address, bytes, "bulk_load");
  emulator::do_later(emulator::asynchronous(block, nullptr, [=] {
    emulator::check_no_mbarrier(*block, address, bytes);
    {
      Seen seen;
      memcpy(block->base + address, from, bytes);
    }
    emulator::deliver(block->shown_mbarrier(flag), bytes);
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

}  // namespace ptx

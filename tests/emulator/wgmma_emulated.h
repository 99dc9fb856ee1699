// Warpgroup matrices: wgmma through its descriptors, done as late as wgmma_wait allows. Included by ptx_emulated.h.
#pragma once

namespace ptx {

inline void wgmma_fence() {}
inline void wgmma_commit() {
  Unseen unseen;
  self().groups.push_back(std::move(self().open));
  self().open.clear();
}

template <int N>
void wgmma_wait() {
  Unseen unseen;
  const uint32_t warpgroup = self().index.x / 128;
  Block& block = *self().block;
  auto finish = [&] {  // the last thread to come does the work of all 128
    emulator::Thread* const* threads = &block.threads[warpgroup * 128];
    for (int i = 1; i < 128; ++i)
      if (threads[i]->groups.size() != threads[0]->groups.size()) throw Fault("wgmma: the warpgroup has diverged");
    while (threads[0]->groups.size() > N) {
      for (size_t call = 0; call < threads[0]->groups.front().size(); ++call) {
        std::vector<emulator::WgmmaCall*> calls;
        for (int i = 0; i < 128; ++i) calls.push_back(&threads[i]->groups.front().at(call));
        calls[0]->run(calls);
      }
      for (int i = 0; i < 128; ++i) threads[i]->groups.pop_front();
    }
  };
  emulator::arrive_and_wait(block.barriers[emulator::WARPGROUPS + warpgroup], 128, "wgmma_wait", finish);
}

template <class T, int N, bool B_IS_N_MAJOR>
struct Wgmma {
  static void mma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    Unseen unseen;
    self().open.push_back({run, d, a, b, accumulate});
  }

  static void run(const std::vector<emulator::WgmmaCall*>& threads) {
    const uint64_t a = threads[0]->a, b = threads[0]->b;
    for (auto* t : threads)
      if (t->a != a || t->b != b || t->accumulate != threads[0]->accumulate)
        throw Fault("wgmma: the warpgroup has diverged");
    static float rows[64][16], columns[16][N];
    read<false>(a, 64, [&](int m, int k) -> float& { return rows[m][k]; });
    read<B_IS_N_MAJOR>(b, N, [&](int n, int k) -> float& { return columns[k][n]; });
    static float product[64][N];
    for (int m = 0; m < 64; ++m) {
      std::fill(product[m], product[m] + N, 0.f);
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < N; ++n) product[m][n] += rows[m][k] * columns[k][n];
    }
    for (int thread = 0; thread < 128; ++thread) {
      const int warp = thread / 32, lane = thread % 32;
      float* d = threads[thread]->d;
      for (int i = 0; i < N / 2; ++i) {
        const float sum = product[16 * warp + lane / 4 + 8 * (i / 2 % 2)][8 * (i / 4) + 2 * (lane % 4) + i % 2];
        d[i] = threads[thread]->accumulate ? d[i] + sum : sum;
      }
    }
  }

  /// An operand [size, 16] through its descriptor: start, leading and stride byte offsets in units of 16 bytes.
  template <bool MN_MAJOR, class F>
  static void read(uint64_t descriptor, int size, F element) {
    if (descriptor >> 62 != 1) throw Fault("wgmma: the descriptor does not say 128-byte swizzle");
    const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
    const uint32_t stride = (descriptor >> 32 & 0x3fff) << 4;
    Block& block = *self().block;
    for (int i = 0; i < size; ++i) {
      for (int k = 0; k < 16; ++k) {
        const uint32_t k_major = start + i % 8 * 128 + i / 8 * stride + k * 2;
        const uint32_t mn_major = start + i % 64 * 2 + i / 64 * leading + k % 8 * 128 + k / 8 * stride;
        const uint32_t address = emulator::swizzle_128(MN_MAJOR ? mn_major : k_major);
        uint16_t bits;
        const uint8_t* from = block.base + address;
        block.address(from, 2, "wgmma");
        {
          Seen seen;
          memcpy(&bits, from, 2);
        }
        element(i, k) = emulator::to_float<T>(bits);
      }
    }
  }
};

template <int N>
void pin_registers(float (&)[N]) {}

}  // namespace ptx

// Warpgroup matrices: wgmma through its descriptors, done as late as wgmma_wait allows. Included by ptx_emulated.h.
#pragma once

namespace ptx {

inline void wgmma_fence() {
  Unseen unseen;
  emulator::aligned("wgmma_fence");
  self().fenced = true;
}
inline void wgmma_commit() {
  Unseen unseen;
  emulator::aligned("wgmma_commit");
  self().groups.push_back(std::move(self().open));
  self().open.clear();
}

/// Completes the executing warp's part, as late as it may; what other warps of the warpgroup have done says nothing.
template <int N>
void wgmma_wait() {
  Unseen unseen;
  emulator::aligned("wgmma_wait");
  self().fenced = false;  // what follows may read and write the registers
  Block& block = *self().block;
  const uint32_t warp = self().warp();
  auto finish = [&] {  // the last lane to come does the work of all 32
    emulator::Thread* const* lanes = &block.threads[warp * 32];
    for (int i = 1; i < 32; ++i)
      if (lanes[i]->groups.size() != lanes[0]->groups.size()) throw Fault("wgmma: the warp has diverged");
    while (lanes[0]->groups.size() > N) {
      for (size_t call = 0; call < lanes[0]->groups.front().size(); ++call) {
        std::vector<emulator::WgmmaCall*> calls;
        for (int i = 0; i < 32; ++i) calls.push_back(&lanes[i]->groups.front().at(call));
        block.warpgroups[warp / 4].compare(warp % 4, *calls[0]);
        calls[0]->run(warp % 4, calls);
      }
      for (int i = 0; i < 32; ++i) lanes[i]->groups.pop_front();
    }
  };
  emulator::warp_sync("wgmma_wait", finish);
}

template <class T, int N, bool B_IS_N_MAJOR>
struct Wgmma {
  static void mma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    Unseen unseen;
    emulator::aligned("wgmma", a ^ b << 7 ^ accumulate);
    if (!self().fenced) throw Fault("wgmma: no wgmma_fence since its registers could be touched");
    self().open.push_back({run, d, a, b, accumulate});
  }

  /// The warp's 16 rows of d.
  static void run(uint32_t warp, const std::vector<emulator::WgmmaCall*>& lanes) {
    const uint64_t a = lanes[0]->a, b = lanes[0]->b;
    for (auto* lane : lanes)
      if (lane->a != a || lane->b != b || lane->accumulate != lanes[0]->accumulate)
        throw Fault("wgmma: the warp has diverged");
    static float rows[16][16], columns[16][N], product[16][N];
    read<false>(a, 16 * warp, 16, [&](int m, int k) -> float& { return rows[m][k]; });
    read<B_IS_N_MAJOR>(b, 0, N, [&](int n, int k) -> float& { return columns[k][n]; });
    for (int m = 0; m < 16; ++m) {
      std::fill(product[m], product[m] + N, 0.f);
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < N; ++n) product[m][n] += rows[m][k] * columns[k][n];
    }
    for (int lane = 0; lane < 32; ++lane) {
      float* d = lanes[lane]->d;
      for (int i = 0; i < N / 2; ++i) {
        const float sum = product[lane / 4 + 8 * (i / 2 % 2)][8 * (i / 4) + 2 * (lane % 4) + i % 2];
        d[i] = lanes[lane]->accumulate ? d[i] + sum : sum;
      }
    }
  }

  /// Rows first ... first + size of an operand [., 16] through its descriptor: start, leading and stride byte offsets
  /// in units of 16 bytes. Swizzling keeps 16 bytes, eight elements along the major dimension, together.
  template <bool MN_MAJOR, class F>
  static void read(uint64_t descriptor, int first, int size, F element) {
    if (descriptor >> 62 != 1) throw Fault("wgmma: the descriptor does not say 128-byte swizzle");
    const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
    const uint32_t stride = (descriptor >> 32 & 0x3fff) << 4;
    const Block& block = *self().block;
    for (int i = first; i < first + size; i += MN_MAJOR ? 8 : 1) {
      for (int k = 0; k < 16; k += MN_MAJOR ? 1 : 8) {
        const uint32_t k_major = start + i % 8 * 128 + i / 8 * stride + k * 2;
        const uint32_t mn_major = start + i % 64 * 2 + i / 64 * leading + k % 8 * 128 + k / 8 * stride;
        const uint32_t address = emulator::swizzle_128(MN_MAJOR ? mn_major : k_major);
        uint16_t bits[8];
        const uint8_t* from = block.base + address;
        block.address(from, 16, "wgmma");
        {
          Seen seen;
          memcpy(bits, from, 16);
        }
        for (int j = 0; j < 8; ++j)
          element(i - first + (MN_MAJOR ? j : 0), k + (MN_MAJOR ? 0 : j)) = emulator::to_float<T>(bits[j]);
      }
    }
  }
};

template <int N>
void pin_registers(float (&)[N]) {}

}  // namespace ptx

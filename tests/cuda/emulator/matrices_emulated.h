// What a warp does with matrices: mma.sync, stmatrix, pairs of 16-bit elements. Included by ptx_emulated.h.
#pragma once

namespace emulator {

template <class T>
float to_float(uint16_t bits) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return std::bit_cast<float>(uint32_t(bits) << 16);
  else
    return __half2float(__half_raw{bits});
}

}  // namespace emulator

namespace ptx {

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
  emulator::aligned("mma");
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
  emulator::aligned("mma");
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
  emulator::aligned("stmatrix");
  auto* lanes = emulator::exchange({address}, "stmatrix");
  const uint32_t lane = self().lane(), values[4] = {r0, r1, r2, r3};
  for (int i = 0; i < 4; ++i) {
    const uint32_t to = lanes[i * 8 + lane / 4]->exchange[0];
    emulator::wrote_shared(to);
    Seen seen;
    memcpy(block.base + to + lane % 4 * 4, &values[i], 4);
  }
  emulator::warp_sync("stmatrix");
}

inline uint4 load_streaming(const void* from) { return *static_cast<const uint4*>(from); }

}  // namespace ptx

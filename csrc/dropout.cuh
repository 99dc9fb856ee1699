// The dropout mask of fastpeft/reference/dropout.py, drawn in registers from (seed, row, column); nothing is stored.
#pragma once
#include <cstdint>

namespace dropout {

/// What the mask of a launch depends on. `threshold` is how many of the 65,536 values of a lane are dropped; 0: none.
struct Mask {
  const int64_t* seed;
  uint32_t threshold;
};

struct RowKey {
  uint32_t low, high;
};

/// splitmix64 of a row's number.
__device__ __forceinline__ RowKey row_key(uint64_t seed, int64_t row) {
  uint64_t z = seed + static_cast<uint64_t>(row + 1) * 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  z = z ^ (z >> 31);
  return {static_cast<uint32_t>(z), static_cast<uint32_t>(z >> 32)};
}

/// Whether columns 2 `pair` and 2 `pair` + 1 of a row are kept, in bits 0 and 1.
__device__ __forceinline__ uint32_t keep_pair(RowKey key, uint32_t pair, uint32_t threshold) {
  uint32_t z = ((pair * 0x9E3779B1u) ^ key.low) * 0x85EBCA6Bu;
  z = ((z ^ (z >> 15)) + key.high) * 0xC2B2AE35u;
  z = z ^ (z >> 16);
  // A signed 16-bit comparison with threshold - 32768 is an unsigned one with threshold once the sign bit is flipped.
  z ^= 0x80008000u;
  const uint32_t limit = threshold << 16;
  return (z << 16 >= limit ? 1u : 0u) | (z >= limit ? 2u : 0u);
}

}  // namespace dropout

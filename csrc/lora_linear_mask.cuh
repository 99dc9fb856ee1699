// The mask of dX in lora_linear.cuh, drawn a little at a time while tensor cores multiply.
#pragma once
#include "dropout.cuh"

namespace lora_linear {

/// What a consumer's thread keeps of its elements of a tile that is N columns wide: a bit for each.
template <int N>
class TileMask {
 public:
  /// Starts the mask of the tile in which the thread's first row is `row`, its first column `column`.
  __device__ __forceinline__ void begin(int64_t seed, int row, int column) {
    keys_[0] = dropout::row_key(seed, row);
    keys_[1] = dropout::row_key(seed, row + 8);
    pair_ = column / 2;
    drawn_ = 0;
  }
  __device__ __forceinline__ bool complete() const { return drawn_ == N / 16; }

  /// Two adjacent columns, and the two that are 8 further, of both rows. New bits push the older ones down.
  __device__ __forceinline__ void draw(uint32_t threshold) {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) bits |= dropout::keep_pair(keys_[i % 2], pair_ + i / 2 * 4, threshold) << (2 * i);
    pair_ += 8;
    ++drawn_;
#pragma unroll
    for (int i = 0; i < N / 64; ++i) {
      words_[i] = words_[i] >> 8 | (i + 1 < N / 64 ? words_[i + 1] : bits) << 24;
    }
  }
  __device__ __forceinline__ void finish(uint32_t threshold) {
#pragma unroll 1
    while (!complete()) draw(threshold);
  }

  /// Whether accumulator `i` is kept, once the mask is complete.
  __device__ __forceinline__ bool keeps(int i) const { return words_[i / 32] >> (i % 32) & 1; }

 private:
  uint32_t words_[N / 64] = {};
  dropout::RowKey keys_[2];
  uint32_t pair_;  // of columns, that comes next
  int drawn_;      // sixteenths of the tile
};

}  // namespace lora_linear

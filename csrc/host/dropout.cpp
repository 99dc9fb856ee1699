// The dropout mask of fastpeft/reference/dropout.py on the CPU, in one pass; PyTorch's operators take a dozen.
#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstdint>

#include "widest.h"

namespace fastpeft {
namespace {

uint64_t row_key(uint64_t seed, int64_t row) {
  uint64_t z = seed + static_cast<uint64_t>(row + 1) * 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

uint32_t word(uint64_t key, uint32_t pair) {
  uint32_t z = ((pair * 0x9E3779B1u) ^ static_cast<uint32_t>(key)) * 0x85EBCA6Bu;
  z = ((z ^ (z >> 15)) + static_cast<uint32_t>(key >> 32)) * 0xC2B2AE35u;
  return z ^ (z >> 16);
}

template <class scalar_t>
void draw_row(scalar_t* keep, int64_t columns, uint64_t key, int limit) {
  const auto kept = [&](uint32_t lane) { return static_cast<scalar_t>(static_cast<int16_t>(lane) >= limit ? 1 : 0); };
  const int64_t pairs = columns / 2;
  for (int64_t j = 0; j < pairs; ++j) {
    const uint32_t z = word(key, static_cast<uint32_t>(j));
    keep[2 * j] = kept(z & 0xFFFF);
    keep[2 * j + 1] = kept(z >> 16);
  }
  if (columns % 2) keep[columns - 1] = kept(word(key, static_cast<uint32_t>(pairs)) & 0xFFFF);
}

at::Tensor keep_mask(const at::Tensor& seed, int64_t threshold, int64_t rows, int64_t columns, at::ScalarType dtype) {
  TORCH_CHECK(seed.scalar_type() == at::kLong && seed.numel() == 1, "keep_mask: seed is ", seed.scalar_type(), " ",
              seed.sizes(), ", expected one int64 element");
  at::Tensor keep = at::empty({rows, columns}, seed.options().dtype(dtype));
  const auto start = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
  const int limit = static_cast<int>(threshold) - (1 << 15);
  AT_DISPATCH_FLOATING_TYPES_AND3(at::kHalf, at::kBFloat16, at::kBool, dtype, "keep_mask", [&] {
    scalar_t* const first = keep.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, rows, 1 + 16384 / (columns + 1), [&](int64_t begin, int64_t end) {
      widest([=] {
        for (int64_t row = begin; row < end; ++row)
          draw_row(first + row * columns, columns, row_key(start, row), limit);
      });
    });
  });
  return keep;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastpeft, m) {
  m.def("keep_mask(Tensor seed, int threshold, int rows, int columns, ScalarType dtype) -> Tensor");
}

TORCH_LIBRARY_IMPL(fastpeft, CPU, m) { m.impl("keep_mask", &keep_mask); }

}  // namespace fastpeft

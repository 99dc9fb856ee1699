// Quantised weights written out on the CPU in one pass: fastpeft/reference/dequantise.py, bit for bit.
#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "four_bit.h"
#include "widest.h"

namespace fastpeft {
namespace {

constexpr int64_t GRAIN = 32768;  // elements for which a thread is worth waking, as in PyTorch's own loops

// The scales of blocks one after another.
class Scales {
 public:
  Scales(const at::Tensor& absmax, const at::Tensor& absmax2, const at::Tensor& code2, const at::Tensor& offset,
         int64_t block2)
      : block2_(block2) {
    if (!absmax2.numel()) {
      plain_ = absmax.const_data_ptr<float>();
      return;
    }
    nested_ = absmax.const_data_ptr<uint8_t>();
    absmax2_ = absmax2.const_data_ptr<float>();
    code2_ = code2.const_data_ptr<float>();
    offset_ = *offset.const_data_ptr<float>();
  }

  void begin(int64_t block) {
    next_ = block;
    group_ = block / block2_;
    end_ = (group_ + 1) * block2_;
  }

  float next() {
    const int64_t j = next_++;
    if (plain_) return plain_[j];
    if (j == end_) {
      ++group_;
      end_ += block2_;
    }
    return code2_[nested_[j]] * absmax2_[group_] + offset_;
  }

 private:
  const float *plain_ = nullptr, *absmax2_ = nullptr, *code2_ = nullptr;
  const uint8_t* nested_ = nullptr;
  float offset_ = 0;
  int64_t block2_, next_ = 0, group_ = 0, end_ = 0;
};

// Where in W what is written lies: rows of some of its columns, one after the other.
struct Part {
  int64_t rows, length, first, stride;

  int64_t end() const { return rows ? first + (rows - 1) * stride + length : first; }
};

// Each row begins a block. Numbers count the part's blocks.
template <class T>
void blocks(T* out, const uint8_t* codes, const float* code, Scales scales, int64_t begin, int64_t end, int64_t block,
            const Part& part) {
  const int64_t in_row = (part.length + block - 1) / block;
  const auto each = [&](const auto& start_of) {
    for (int64_t j = begin; j < end; ++j) {
      const int64_t row = j / in_row, done = (j - row * in_row) * block, from = part.first + row * part.stride + done;
      if (done == 0 || j == begin) scales.begin(from / block);
      T* const to = out + row * part.length + done;
      const int64_t count = std::min(block, part.length - done);
      const float scale = scales.next();
      const int64_t written = start_of(to, codes + from / 2, count, code, scale);
      if (written < count) block_any(to + written, codes + (from + written) / 2, count - written, code, scale);
    }
  };
#ifdef FASTPEFT_X86
  if (width() == Width::avx512) return in_avx512([&] { each([](auto... block) { return block_avx512(block...); }); });
  if (width() == Width::avx2) return in_avx2([&] { each([](auto... block) { return block_avx2(block...); }); });
#endif
  each([](auto...) { return 0; });
}

template <class T>
void rows(T* out, const int8_t* codes, const float* absmax, int64_t begin, int64_t end, const Part& part) {
  widest([=] {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t from = part.first + n * part.stride;
      const float scale = absmax[from / part.stride] * static_cast<float>(1.0 / 127.0);
      for (int64_t k = 0; k < part.length; ++k)
        out[n * part.length + k] = static_cast<T>(static_cast<float>(codes[from + k]) * scale);
    }
  });
}

void write_four_bit(at::Tensor& out, const at::Tensor& codes, const at::Tensor& code, const Scales& scales,
                    int64_t block, const Part& part) {
  const auto* const bytes = codes.const_data_ptr<uint8_t>();
  const auto* const values = code.const_data_ptr<float>();
  const int64_t count = part.rows * ((part.length + block - 1) / block);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, out.scalar_type(), "dequantise_", [&] {
    scalar_t* const to = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, count, 1 + GRAIN / block,
                     [&](int64_t begin, int64_t end) { blocks(to, bytes, values, scales, begin, end, block, part); });
  });
}

void write_eight_bit(at::Tensor& out, const at::Tensor& codes, const at::Tensor& absmax, const Part& part) {
  if (out.scalar_type() == at::kHalf) {  // compilers turn no loop of these roundings into the CPU's own
    const int64_t row = part.first / part.stride;
    at::mul_out(out, codes.as_strided({part.rows, part.length}, {part.stride, 1}, codes.storage_offset() + part.first),
                absmax.narrow(0, row, part.rows).mul(1.0 / 127.0).unsqueeze(1));
    return;
  }
  const auto* const numbers = codes.const_data_ptr<int8_t>();
  const auto* const scales = absmax.const_data_ptr<float>();
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, out.scalar_type(), "dequantise_", [&] {
    scalar_t* const to = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, part.rows, 1 + GRAIN / (part.length + 1),
                     [&](int64_t begin, int64_t end) { rows(to, numbers, scales, begin, end, part); });
  });
}

void check(const char* name, const at::Tensor& tensor, at::ScalarType dtype, int64_t count) {
  TORCH_CHECK(tensor.scalar_type() == dtype && tensor.numel() >= count && tensor.is_contiguous(), "dequantise_: ", name,
              " is ", tensor.scalar_type(), " ", tensor.sizes(), ", expected ", count, " contiguous in ", dtype);
}

at::Tensor& dequantise_(at::Tensor& out, const at::Tensor& codes, const at::Tensor& absmax, const at::Tensor& code,
                        const at::Tensor& absmax2, const at::Tensor& code2, const at::Tensor& offset, int64_t block,
                        int64_t block2, int64_t first, std::optional<int64_t> columns) {
  TORCH_CHECK(out.is_contiguous() && out.dim() == 2, "dequantise_: out is ", out.sizes(), ", expected contiguous rows");
  if (!out.numel()) return out;
  Part part{out.size(0), out.size(1), first, columns.value_or(out.size(1))};
  TORCH_CHECK(first >= 0 && part.length <= part.stride, "dequantise_: element ", first, " of ", part.stride,
              " columns");
  if (!code.numel()) {
    check("codes", codes, at::kChar, part.end());
    check("absmax", absmax, at::kFloat, first / part.stride + part.rows);
    write_eight_bit(out, codes, absmax, part);
    return out;
  }
  if (part.length == part.stride) part = {1, out.numel(), first, out.numel()};
  TORCH_CHECK(block > 1 && block % 2 == 0 && block2 > 0, "dequantise_: block is ", block, ", block2 ", block2);
  TORCH_CHECK(first % block == 0 && (part.rows == 1 || part.stride % block == 0), "dequantise_: rows begin no blocks");
  const int64_t count = (part.end() + block - 1) / block;
  const bool nested = absmax2.numel() > 0;
  check("codes", codes, at::kByte, (part.end() + 1) / 2);
  check("absmax", absmax, nested ? at::kByte : at::kFloat, count);
  check("code", code, at::kFloat, 16);
  if (nested) {
    check("absmax2", absmax2, at::kFloat, (count + block2 - 1) / block2);
    check("code2", code2, at::kFloat, 256);
    check("offset", offset, at::kFloat, 1);
  }
  write_four_bit(out, codes, code, Scales(absmax, absmax2, code2, offset, block2), block, part);
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastpeft, m) {
  m.def(
      "dequantise_(Tensor(a!) out, Tensor codes, Tensor absmax, Tensor code, Tensor absmax2, Tensor code2, "
      "Tensor offset, int block, int block2, int first=0, int? columns=None) -> Tensor(a!)");
}

TORCH_LIBRARY_IMPL(fastpeft, CPU, m) { m.impl("dequantise_", &dequantise_); }

}  // namespace fastpeft

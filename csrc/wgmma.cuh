// wgmma.mma_async m64nNk16: its operand list names every accumulator register, so it is spelled by macros.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace ptx {

/// d [64, N] (+)= a [64, 16] b [16, N] for a warpgroup, float sums of T products; a and b by shared-memory descriptor.
/// B_IS_N_MAJOR: b's rows are contiguous along n instead of k. The thread's d[i] lies in row
/// 16 warp + lane / 4 + 8 (i / 2 % 2) and column 8 (i / 4) + 2 (lane % 4) + i % 2.
template <class T, int N, bool B_IS_N_MAJOR>
struct Wgmma;

// "%<tens>0, ... %<tens>9, ": ten operands.
#define TEN(t)      "%" t "0, %" t "1, %" t "2, %" t "3, %" t "4, %" t "5, %" t "6, %" t "7, %" t "8, %" t "9, "
#define OPERANDS_60 TEN("") TEN("1") TEN("2") TEN("3") TEN("4") TEN("5")
#define OPERANDS_64 OPERANDS_60 "%60, %61, %62, %63"
#define OPERANDS_128 \
  OPERANDS_60 TEN("6") TEN("7") TEN("8") TEN("9") TEN("10") TEN("11") "%120, %121, %122, %123, %124, %125, %126, %127"

#define D4(i)       "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(i)      D4(i), D4(i + 4), D4(i + 8), D4(i + 12)
#define D64(i)      D16(i), D16(i + 16), D16(i + 32), D16(i + 48)
#define OUTPUTS_64  D64(0)
#define OUTPUTS_128 D64(0), D64(64)

// A, B, P: the operand numbers of the two descriptors and of `accumulate`.
#define DEFINE_WGMMA(T, TYPE, N, REGISTERS, A, B, P, MAJOR)                                                  \
  template <>                                                                                                \
  struct Wgmma<T, N, MAJOR> {                                                                                \
    static __device__ __forceinline__ void mma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) { \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P                                                     \
                   ", 0;\n"                                                                                  \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" OPERANDS_##REGISTERS \
                   "}, " A ", " B ", p, 1, 1, 0, " #MAJOR ";\n}"                                             \
                   : OUTPUTS_##REGISTERS                                                                     \
                   : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                     \
    }                                                                                                        \
  };
#define DEFINE_SHAPES(T, TYPE)                               \
  DEFINE_WGMMA(T, TYPE, 128, 64, "%64", "%65", "%66", 0)     \
  DEFINE_WGMMA(T, TYPE, 128, 64, "%64", "%65", "%66", 1)     \
  DEFINE_WGMMA(T, TYPE, 256, 128, "%128", "%129", "%130", 0) \
  DEFINE_WGMMA(T, TYPE, 256, 128, "%128", "%129", "%130", 1)

DEFINE_SHAPES(__nv_bfloat16, "bf16")
DEFINE_SHAPES(__half, "f16")

#undef TEN
#undef OPERANDS_60
#undef OPERANDS_64
#undef OPERANDS_128
#undef D4
#undef D16
#undef D64
#undef OUTPUTS_64
#undef OUTPUTS_128
#undef DEFINE_WGMMA
#undef DEFINE_SHAPES

}  // namespace ptx

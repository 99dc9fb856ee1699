// Loops that are compiled for several instruction sets, of which the CPU's is taken at run time: -march is nobody's.
#pragma once

#include <ATen/Version.h>

#include <string>

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTPEFT_X86
#define FASTPEFT_AVX2   __attribute__((target("avx2,f16c"), flatten))
#define FASTPEFT_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"), flatten))
#endif

namespace fastpeft {

enum class Width { any, avx2, avx512 };

// As PyTorch's own loops choose theirs, so that ATEN_CPU_CAPABILITY holds for both.
inline Width width() {
#ifdef FASTPEFT_X86
  static const std::string name = at::get_cpu_capability();
  static const Width found = name == "AVX512" ? Width::avx512 : name == "AVX2" ? Width::avx2 : Width::any;
  return found;
#else
  return Width::any;
#endif
}

#ifdef FASTPEFT_X86
template <class Loop>
FASTPEFT_AVX512 void in_avx512(const Loop& loop) {
  loop();
}

template <class Loop>
FASTPEFT_AVX2 void in_avx2(const Loop& loop) {
  loop();
}
#endif

// Runs a function of no arguments, all of whose calls are inlined. Its results are the same at any width, since nothing
// is contracted (-ffp-contract=off).
template <class Loop>
void widest(const Loop& loop) {
#ifdef FASTPEFT_X86
  if (width() == Width::avx512) return in_avx512(loop);
  if (width() == Width::avx2) return in_avx2(loop);
#endif
  loop();
}

}  // namespace fastpeft

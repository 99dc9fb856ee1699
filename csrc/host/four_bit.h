// A block of 4-bit codes written out: the 16 values are scaled and rounded once, and each code looks its own up.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

#include "widest.h"
#ifdef FASTPEFT_X86
#include <immintrin.h>
#endif

namespace fastpeft {

// `count` elements that share a scale. The first begins a byte, in its high half.
template <class T>
void block_any(T* out, const uint8_t* codes, int64_t count, const float* code, float scale) {
  T values[16];
  for (int c = 0; c < 16; ++c) values[c] = static_cast<T>(code[c] * scale);
  for (int64_t i = 0; i < count / 2; ++i) {
    out[2 * i] = values[codes[i] >> 4];
    out[2 * i + 1] = values[codes[i] & 15];
  }
  if (count % 2) out[count - 1] = values[codes[count / 2] >> 4];
}

#ifdef FASTPEFT_X86
// Below, the same for as many elements as fill whole registers; each returns how many those were. The table is in a
// register, and of an index only the bits that tell its elements apart are looked at.

FASTPEFT_AVX512 inline __m256i rounded(__m512 values, c10::Half) {
  return _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

FASTPEFT_AVX512 inline __m256i rounded(__m512 values, c10::BFloat16) {
  const __m512i bits = _mm512_castps_si512(values), high = _mm512_srli_epi32(bits, 16);
  const __m512i bias = _mm512_add_epi32(_mm512_and_si512(high, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7FFF));
  const __m512i even = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(even, nan, _mm512_set1_epi32(0x7FC0)));
}

template <class T>  // of 16 bits
FASTPEFT_AVX512 int64_t block_avx512(T* out, const uint8_t* codes, int64_t count, const float* code, float scale) {
  const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(code), _mm512_set1_ps(scale));
  const __m512i table = _mm512_broadcast_i64x4(rounded(scaled, T()));
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 2)));
    const __m512i index = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
    _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(index, table));
  }
  return i;
}

FASTPEFT_AVX512 inline int64_t block_avx512(float* out, const uint8_t* codes, int64_t count, const float* code,
                                            float scale) {
  const __m512 table = _mm512_mul_ps(_mm512_loadu_ps(code), _mm512_set1_ps(scale));
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i / 2)));
    const __m512i index = _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
    _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(index, table));
  }
  return i;
}

FASTPEFT_AVX2 inline __m128i rounded(__m256 values, c10::Half) {
  return _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

FASTPEFT_AVX2 inline __m128i rounded(__m256 values, c10::BFloat16) {
  const __m256i bits = _mm256_castps_si256(values), high = _mm256_srli_epi32(bits, 16);
  const __m256i bias = _mm256_add_epi32(_mm256_and_si256(high, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7FFF));
  const __m256i even = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
  const __m256i found = _mm256_blendv_epi8(even, _mm256_set1_epi32(0x7FC0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(found), _mm256_extracti128_si256(found, 1));
}

template <class T>  // of 16 bits, whose two bytes are looked up apart
FASTPEFT_AVX2 int64_t block_avx2(T* out, const uint8_t* codes, int64_t count, const float* code, float scale) {
  const __m256 factor = _mm256_set1_ps(scale);
  const __m128i first = rounded(_mm256_mul_ps(_mm256_loadu_ps(code), factor), T());
  const __m128i second = rounded(_mm256_mul_ps(_mm256_loadu_ps(code + 8), factor), T());
  const __m128i byte = _mm_set1_epi16(0xFF), half = _mm_set1_epi8(15);
  const __m256i low =
      _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(second, byte)));
  const __m256i high =
      _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8)));
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 2));
    const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), half), odd = _mm_and_si128(bytes, half);
    const __m256i index = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
    const __m256i lows = _mm256_shuffle_epi8(low, index), highs = _mm256_shuffle_epi8(high, index);
    const __m256i one = _mm256_unpacklo_epi8(lows, highs), other = _mm256_unpackhi_epi8(lows, highs);
    auto* const to = reinterpret_cast<__m256i*>(out + i);
    _mm256_storeu_si256(to, _mm256_permute2x128_si256(one, other, 0x20));
    _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(one, other, 0x31));
  }
  return i;
}

FASTPEFT_AVX2 inline int64_t block_avx2(float* out, const uint8_t* codes, int64_t count, const float* code,
                                        float scale) {
  const __m256 factor = _mm256_set1_ps(scale);
  const __m256 low = _mm256_mul_ps(_mm256_loadu_ps(code), factor);
  const __m256 high = _mm256_mul_ps(_mm256_loadu_ps(code + 8), factor);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    int32_t four;
    std::memcpy(&four, codes + i / 2, sizeof four);
    const __m256i bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
    const __m256i index = _mm256_or_si256(_mm256_srli_epi64(bytes, 4), _mm256_slli_epi64(bytes, 32));
    const __m256 eighth = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    _mm256_storeu_ps(
        out + i, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), eighth));
  }
  return i;
}

inline int64_t block_avx512(double*, const uint8_t*, int64_t, const float*, float) { return 0; }
inline int64_t block_avx2(double*, const uint8_t*, int64_t, const float*, float) { return 0; }
#endif

}  // namespace fastpeft

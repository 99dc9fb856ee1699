#include <cstring>

#include "multi_lora.h"
#include "widest.h"

// The same source for each width of vectors.
#define INLINE inline __attribute__((always_inline))

namespace fastpeft {
namespace {

template <class S, int BYTES>
struct Vector {
  typedef S type __attribute__((vector_size(BYTES)));
  static constexpr int64_t lanes = BYTES / sizeof(S);

  static INLINE void load(type& to, const S* from) { std::memcpy(&to, from, BYTES); }

  static INLINE S sum(const type& v) {
    if constexpr (BYTES > 16) {
      typename Vector<S, BYTES / 2>::type halves[2];
      std::memcpy(halves, &v, BYTES);
      return Vector<S, BYTES / 2>::sum(halves[0] + halves[1]);
    } else if constexpr (lanes == 4) {
      return (v[0] + v[2]) + (v[1] + v[3]);
    } else {
      return v[0] + v[1];
    }
  }
};

template <class S, int BYTES, int T, int R>
INLINE void products_of(const S* const* x, Rows<S> a, int64_t k, S scale, S* s, int64_t stride) {
  using V = Vector<S, BYTES>;
  typename V::type sums[T][R] = {};
  int64_t i = 0;
  for (; i + V::lanes <= k; i += V::lanes) {
    typename V::type a_i[R], x_i;
    for (int r = 0; r < R; ++r) V::load(a_i[r], a.data + r * a.stride + i);
    for (int t = 0; t < T; ++t) {
      V::load(x_i, x[t] + i);
      for (int r = 0; r < R; ++r) sums[t][r] += x_i * a_i[r];
    }
  }
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r) {
      S rest = 0;
      for (int64_t j = i; j < k; ++j) rest += x[t][j] * a.data[r * a.stride + j];
      s[t * stride + r] = (V::sum(sums[t][r]) + rest) * scale;
    }
}

template <class S, int BYTES, int T>
INLINE void products_for(const S* const* x, Rows<S> a, int64_t ranks, int64_t k, S scale, S* s, int64_t stride) {
  if (ranks == RANKS) return products_of<S, BYTES, T, RANKS>(x, a, k, scale, s, stride);
  for (int64_t r = 0; r < ranks; ++r)
    products_of<S, BYTES, T, 1>(x, {a.data + r * a.stride, a.stride}, k, scale, s + r, stride);
}

template <class S, int BYTES>
INLINE void all_products(const S* const* x, int64_t tokens, Rows<S> a, int64_t ranks, int64_t k, S scale, S* s,
                         int64_t stride) {
  constexpr int T = BYTES == 64 ? 4 : 2;  // as many as the registers hold, which are 32 of 64 bytes and 16 of others
  int64_t t = 0;
  for (; t + T <= tokens; t += T) products_for<S, BYTES, T>(x + t, a, ranks, k, scale, s + t * stride, stride);
  for (; t < tokens; ++t) products_for<S, BYTES, 1>(x + t, a, ranks, k, scale, s + t * stride, stride);
}

template <class S, int BYTES, int T, int N>
INLINE void combinations_of(const S* const* s, Rows<S> b, int64_t rank, S* const* out, int64_t first, bool add) {
  using V = Vector<S, BYTES>;
  typename V::type sums[T][N] = {};
  for (int64_t j = 0; j < rank; ++j) {
    typename V::type b_j[N];
    for (int n = 0; n < N; ++n) V::load(b_j[n], b.data + j * b.stride + first + n * V::lanes);
    for (int t = 0; t < T; ++t)
      for (int n = 0; n < N; ++n) sums[t][n] += s[t][j] * b_j[n];
  }
  for (int t = 0; t < T; ++t)
    for (int n = 0; n < N; ++n) {
      S* const to = out[t] + first + n * V::lanes;
      typename V::type sum = sums[t][n], before;
      if (add) {
        V::load(before, to);
        sum = before + sum;
      }
      std::memcpy(to, &sum, BYTES);
    }
}

template <class S, int BYTES, int T>
INLINE void combinations_for(const S* const* s, Rows<S> b, int64_t rank, int64_t columns, S* const* out, bool add) {
  constexpr int64_t lanes = Vector<S, BYTES>::lanes;
  int64_t n = 0;
  for (; n + 2 * lanes <= columns; n += 2 * lanes)
    combinations_of<S, BYTES, T, 2>(s, b, rank, out, n, add);
  for (; n < columns; ++n)
    for (int t = 0; t < T; ++t) {
      S sum = 0;
      for (int64_t j = 0; j < rank; ++j) sum += s[t][j] * b.data[j * b.stride + n];
      out[t][n] = add ? out[t][n] + sum : sum;
    }
}

template <class S, int BYTES>
INLINE void all_combinations(const S* const* s, int64_t tokens, Rows<S> b, int64_t rank, int64_t columns, S* const* out,
                             bool add) {
  int64_t t = 0;
  for (; t + 4 <= tokens; t += 4) combinations_for<S, BYTES, 4>(s + t, b, rank, columns, out + t, add);
  for (; t < tokens; ++t) combinations_for<S, BYTES, 1>(s + t, b, rank, columns, out + t, add);
}

template <class S>
struct Ways {
  void (*products)(const S* const*, int64_t, Rows<S>, int64_t, int64_t, S, S*, int64_t);
  void (*combinations)(const S* const*, int64_t, Rows<S>, int64_t, int64_t, S* const*, bool);
};

#define WAYS(NAME, BYTES, TARGET)                                                                                \
  template <class S>                                                                                             \
  struct NAME {                                                                                                  \
    TARGET static void products(const S* const* x, int64_t tokens, Rows<S> a, int64_t ranks, int64_t k, S scale, \
                                S* s, int64_t stride) {                                                          \
      all_products<S, BYTES>(x, tokens, a, ranks, k, scale, s, stride);                                          \
    }                                                                                                            \
    TARGET static void combinations(const S* const* s, int64_t tokens, Rows<S> b, int64_t rank, int64_t columns, \
                                    S* const* out, bool add) {                                                   \
      all_combinations<S, BYTES>(s, tokens, b, rank, columns, out, add);                                         \
    }                                                                                                            \
  };

WAYS(Plain, 16, )
#ifdef FASTPEFT_X86
WAYS(Avx2, 32, __attribute__((target("avx2"))))
WAYS(Avx512, 64, __attribute__((target("avx512f"))))
#endif

template <class S>
const Ways<S>& ways() {
  static const Ways<S> found = [] {
#ifdef FASTPEFT_X86
    if (width() == Width::avx512) return Ways<S>{&Avx512<S>::products, &Avx512<S>::combinations};
    if (width() == Width::avx2) return Ways<S>{&Avx2<S>::products, &Avx2<S>::combinations};
#endif
    return Ways<S>{&Plain<S>::products, &Plain<S>::combinations};
  }();
  return found;
}

}  // namespace

void products(const float* const* x, int64_t tokens, Rows<float> a, int64_t ranks, int64_t k, float scale, float* s,
              int64_t stride) {
  ways<float>().products(x, tokens, a, ranks, k, scale, s, stride);
}

void products(const double* const* x, int64_t tokens, Rows<double> a, int64_t ranks, int64_t k, double scale,
              double* s, int64_t stride) {
  ways<double>().products(x, tokens, a, ranks, k, scale, s, stride);
}

void combinations(const float* const* s, int64_t tokens, Rows<float> b, int64_t rank, int64_t columns,
                  float* const* out, bool add) {
  ways<float>().combinations(s, tokens, b, rank, columns, out, add);
}

void combinations(const double* const* s, int64_t tokens, Rows<double> b, int64_t rank, int64_t columns,
                  double* const* out, bool add) {
  ways<double>().combinations(s, tokens, b, rank, columns, out, add);
}

}  // namespace fastpeft

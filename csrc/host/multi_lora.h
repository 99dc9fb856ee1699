// The two products of multi_lora on the CPU, each sum in an order of its own: the vectors of the machine it runs on.
#pragma once

#include <cstdint>

namespace fastpeft {

constexpr int64_t RANKS = 4;  // of S that are computed together, at most

template <class S>
struct Rows {
  const S* data;
  int64_t stride;
};

// s[t][j] = scale · Σ x[t][i] a[j][i], for j < `ranks` <= RANKS and i < k.
void products(const float* const* x, int64_t tokens, Rows<float> a, int64_t ranks, int64_t k, float scale, float* s,
              int64_t stride);
void products(const double* const* x, int64_t tokens, Rows<double> a, int64_t ranks, int64_t k, double scale,
              double* s, int64_t stride);

// Σ s[t][j] b[j][n], for n < `columns` and j < rank: written to out[t][n], or added to what is there.
void combinations(const float* const* s, int64_t tokens, Rows<float> b, int64_t rank, int64_t columns,
                  float* const* out, bool add);
void combinations(const double* const* s, int64_t tokens, Rows<double> b, int64_t rank, int64_t columns,
                  double* const* out, bool add);

}  // namespace fastpeft

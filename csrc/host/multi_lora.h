// The two products of multi_lora on the CPU, each sum in an order of its own: the vectors of the machine it runs on.
#pragma once

#include <cstdint>

namespace fastpeft {

constexpr int64_t RANKS = 4;      // of S that are computed together, at most
constexpr int64_t COLUMNS = 256;  // of y, likewise

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

// out[t][n] = Σ s[t][j] b[j][n], for n < `columns` <= COLUMNS and j < rank; a line of `out` has COLUMNS places.
void combinations(const float* const* s, int64_t tokens, Rows<float> b, int64_t rank, int64_t columns, float* out);
void combinations(const double* const* s, int64_t tokens, Rows<double> b, int64_t rank, int64_t columns, double* out);

}  // namespace fastpeft

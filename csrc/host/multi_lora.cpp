// multi_lora's forward on the CPU: y[t] += S[t] Bᵀ with S[t] = scale x[t] Aᵀ, of the slot of t. fastpeft/reference has the
// formula, and PyTorch's operators take four calls a slice for it.
//
// Every sum is added up in an order of its own, whatever else the batch holds: a token's bits do not depend on it.
#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "multi_lora.h"

namespace fastpeft {
namespace {

constexpr int64_t TOKENS = 64;      // of an item, at most: whoever converts A and B for it does so for all of them
constexpr int64_t BLOCK = 16;       // of those, and columns of y, of which what is added is computed at once
constexpr int64_t COLUMNS = 256;
constexpr int64_t GRAIN = 1 << 18;  // products that are worth a thread

// Rows of a matrix that is read as S, whatever it is.
struct Matrix {
  const char* data;
  at::ScalarType dtype;
  int64_t row, column;  // strides, in elements

  template <class S>
  Rows<S> rows(int64_t first, int64_t count, int64_t from, int64_t length, std::vector<S>& room) const {
    Rows<S> found{nullptr, length};
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "multi_lora", [&] {
      const auto* given = reinterpret_cast<const scalar_t*>(data) + first * row + from * column;
      if constexpr (std::is_same_v<scalar_t, S>) {
        if (column == 1) {
          found = {given, row};
          return;
        }
      }
      room.resize(std::max<size_t>(room.size(), count * length));
      if (std::abs(row) < std::abs(column)) {
        for (int64_t j = 0; j < length; ++j)
          for (int64_t i = 0; i < count; ++i) room[i * length + j] = static_cast<S>(given[i * row + j * column]);
      } else {
        for (int64_t i = 0; i < count; ++i)
          for (int64_t j = 0; j < length; ++j) room[i * length + j] = static_cast<S>(given[i * row + j * column]);
      }
      found.data = room.data();
    });
    return found;
  }
};

Matrix matrix(const at::Tensor& t, int64_t row, int64_t column) {
  return {static_cast<const char*>(t.const_data_ptr()), t.scalar_type(), t.stride(row), t.stride(column)};
}

Matrix slot_of(const at::Tensor& table, int64_t slot, int64_t row, int64_t column) {
  Matrix found = matrix(table, row, column);
  found.data += slot * table.stride(0) * static_cast<int64_t>(table.itemsize());
  return found;
}

// Where a row of y lies from `first` on, if its elements are adjacent and of type S, else null.
template <class S>
S* adjacent(const at::Tensor& y, int64_t token, int64_t first) {
  if (y.scalar_type() != c10::CppTypeToScalarType<S>::value || y.stride(1) != 1) return nullptr;
  return static_cast<S*>(y.data_ptr()) + token * y.stride(0) + first;
}

template <class S>
void add_to(const at::Tensor& y, int64_t token, int64_t first, const S* delta, int64_t count) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, y.scalar_type(), "multi_lora", [&] {
    const int64_t step = y.stride(1);
    scalar_t* const to = static_cast<scalar_t*>(y.data_ptr()) + token * y.stride(0) + first * step;
    for (int64_t i = 0; i < count; ++i) to[i * step] = static_cast<scalar_t>(static_cast<S>(to[i * step]) + delta[i]);
  });
}

// Tokens of one slot, at the places `first` ... `last` of the order.
struct Item {
  int64_t slot, first, last;
};

struct Batch {
  at::TensorList ys, as, bs;
  const at::Tensor &x, &scales, &ranks;
  const int32_t* order;

  // `[slots]` or `[P, slots]`.
  static int64_t place(const at::Tensor& table, int64_t p, int64_t slot) {
    return slot * table.stride(-1) + (table.dim() == 2 ? p * table.stride(0) : 0);
  }
  int64_t rank(int64_t p, int64_t slot) const {
    const int64_t most = as[p].size(1);
    if (!ranks.defined()) return most;
    return std::clamp<int64_t>(ranks.const_data_ptr<int32_t>()[place(ranks, p, slot)], 0, most);
  }
};

template <class S>
void serve(const Batch& batch, const Item& item, const at::Tensor& s) {
  const int64_t tokens = item.last - item.first, k = batch.x.size(1);
  std::vector<S> x_rows[TOKENS], room;
  const S *x[TOKENS], *s_rows[TOKENS];
  S sums[BLOCK][COLUMNS];
  const Matrix all = matrix(batch.x, 0, 1);
  for (int64_t t = 0; t < tokens; ++t)
    x[t] = all.rows<S>(batch.order[item.first + t], 1, 0, k, x_rows[t]).data;
  int64_t column = 0;
  for (size_t p = 0; p < batch.ys.size(); ++p) {
    const int64_t rank = batch.rank(p, item.slot), n = batch.bs[p].size(1);
    const S scale = batch.scales.const_data_ptr<S>()[Batch::place(batch.scales, p, item.slot)];
    S* const first = s.mutable_data_ptr<S>() + item.first * s.size(2) + column;
    const Matrix a = slot_of(batch.as[p], item.slot, 1, 2), b = slot_of(batch.bs[p], item.slot, 2, 1);
    for (int64_t j = 0; j < rank; j += RANKS) {
      const int64_t count = std::min(RANKS, rank - j);
      products(x, tokens, a.rows<S>(j, count, 0, k, room), count, k, scale, first + j, s.size(2));
    }
    for (int64_t t = 0; t < tokens; ++t) s_rows[t] = first + t * s.size(2);
    for (int64_t c = 0; rank && c < n; c += COLUMNS) {
      const int64_t count = std::min(COLUMNS, n - c);
      const Rows<S> columns = b.rows<S>(0, rank, c, count, room);
      for (int64_t t = 0; t < tokens; t += BLOCK) {
        const int64_t block = std::min(BLOCK, tokens - t);
        const int32_t* const places = batch.order + item.first + t;
        S* out[BLOCK];
        for (int64_t i = 0; i < block; ++i) out[i] = adjacent<S>(batch.ys[p], places[i], c);
        const bool in_place = out[0] != nullptr;
        for (int64_t i = 0; i < block && !in_place; ++i) out[i] = sums[i];
        combinations(s_rows + t, block, columns, rank, count, out, in_place);
        for (int64_t i = 0; i < block && !in_place; ++i) add_to(batch.ys[p], places[i], c, sums[i], count);
      }
    }
    column += batch.as[p].size(1);
  }
}

void check(const int32_t* order, const at::Tensor& starts, int64_t tokens) {
  const auto* first = starts.const_data_ptr<int32_t>();
  const int64_t slots = starts.numel() - 1;
  for (int64_t slot = 0; slot < slots; ++slot)
    TORCH_CHECK(0 <= first[slot] && first[slot] <= first[slot + 1] && first[slot + 1] <= tokens,
                "multi_lora: token_slots was routed to the places ", first[slot], " to ", first[slot + 1], " of ", tokens);
  for (int64_t at = 0; at < first[slots]; ++at)
    TORCH_CHECK(0 <= order[at] && order[at] < tokens, "multi_lora: token_slots was routed to token ", order[at], " of ",
                tokens);
}

// How many threads the batch is worth.
int64_t threads_for(const Batch& batch, const at::Tensor& starts) {
  const auto* first = starts.const_data_ptr<int32_t>();
  int64_t products = 0;
  for (int64_t slot = 0; slot + 1 < starts.numel(); ++slot)
    for (size_t p = 0; first[slot] < first[slot + 1] && p < batch.as.size(); ++p)
      products += (first[slot + 1] - first[slot]) * batch.rank(p, slot) * (batch.x.size(1) + batch.bs[p].size(1));
  return std::clamp<int64_t>(products / GRAIN, 1, at::get_num_threads());
}

std::vector<Item> items_of(const at::Tensor& starts, int64_t tokens, int64_t threads) {
  const auto* first = starts.const_data_ptr<int32_t>();
  const int64_t most = std::clamp<int64_t>((tokens + threads - 1) / threads, 2, TOKENS);
  std::vector<Item> items;
  for (int64_t slot = 0; slot + 1 < starts.numel(); ++slot)
    for (int64_t at = first[slot]; at < first[slot + 1]; at += most)
      items.push_back({slot, at, std::min<int64_t>(at + most, first[slot + 1])});
  return items;
}

// S, as fastpeft/reference/multi_lora.py has it.
at::Tensor multi_lora_add_(at::TensorList ys, const at::Tensor& x, at::TensorList as, at::TensorList bs,
                           const at::Tensor& order, const at::Tensor& starts, const at::Tensor& scales,
                           const std::optional<at::Tensor>& ranks) {
  int64_t columns = 0;
  for (const at::Tensor& a : as) columns += a.size(1);
  const bool wide = as[0].scalar_type() == at::kDouble;
  at::Tensor s = at::empty({1, x.size(0), columns}, x.options().dtype(wide ? at::kDouble : at::kFloat));
  const at::Tensor order_ = order.contiguous(), starts_ = starts.contiguous(), none;
  const Batch batch{ys, as, bs, x, scales, ranks ? *ranks : none, order_.const_data_ptr<int32_t>()};
  check(batch.order, starts_, x.size(0));
  const int64_t threads = threads_for(batch, starts_);
  const std::vector<Item> items = items_of(starts_, x.size(0), threads);
  const auto count = static_cast<int64_t>(items.size());
  at::parallel_for(0, count, (count + threads - 1) / threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) wide ? serve<double>(batch, items[i], s) : serve<float>(batch, items[i], s);
  });
  return s;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastpeft, m) {
  m.def(
      "multi_lora_add_(Tensor(a!)[] ys, Tensor x, Tensor[] lora_as, Tensor[] lora_bs, Tensor order, Tensor starts, "
      "Tensor scales, Tensor? ranks) -> Tensor");
}

TORCH_LIBRARY_IMPL(fastpeft, CPU, m) { m.impl("multi_lora_add_", &multi_lora_add_); }

}  // namespace fastpeft

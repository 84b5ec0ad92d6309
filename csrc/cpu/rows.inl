// Squares of the rows of a matrix, added up along rows and columns: the loops of normalize.inl's first pass.
#pragma once

#include <type_traits>

#include "core/matrices.h"
#include "core/pairwise.h"
#include "cpu/formats.inl"
#include "cpu/reduce.inl"

namespace fusedopt {
namespace {

// Prefetches the lines that lie some way ahead of n numbers: a few at a time, because more requests at once would wait
// for each other. And once per page it prefetches a number two pages ahead, to have its address translated in time,
// because the hardware's own prefetching ends with a page. On Zen 4, with pages of 4 KiB, a thread then reads two
// tensors in .34 ns per element instead of .41.
template <int n, class Number>
FUSEDOPT_FN void prefetch_after(const Number* x) {
  constexpr size_t kLine = 64, kPage = 4096, kAhead = 3072;  // bytes
  const char* first = reinterpret_cast<const char*>(x);
  for (size_t line = 0; line < n * sizeof(Number); line += kLine) __builtin_prefetch(first + kAhead + line);
  if (reinterpret_cast<uintptr_t>(first) % kPage < n * sizeof(Number)) __builtin_prefetch(first + 2 * kPage);
}

// Columns of some rows of a matrix, times a multiplier unless that is 1. It mostly is, and AVX-512 can then convert to
// double while loading.
template <class Number, int kRows, bool kIsScaled>
struct Rows {
  const Number* at[kRows];
  float multiplier;

  FUSEDOPT_FN Floats half(int row, int column) const { return scaled(load_floats(at[row] + column)); }
  FUSEDOPT_FN WideFloats lanes(int row, int column) const { return scaled(load_wide(at[row] + column)); }

  // `count` of the rows, from the first on.
  template <int first, int count>
  FUSEDOPT_FN Rows<Number, count, kIsScaled> pick() const {
    Rows<Number, count, kIsScaled> picked{{}, multiplier};
    for (int r = 0; r < count; ++r) picked.at[r] = at[first + r];
    return picked;
  }

 private:
  template <class Vector>
  FUSEDOPT_FN Vector scaled(const Vector& x) const {
    return kIsScaled ? x * multiplier : x;
  }
};

// Calls add(rows, first column, their sums, whether columns are filled up) for every 16 columns from `begin` to `end`;
// the last ones are filled up with zeros.
template <class Number, int kRows, bool kIsScaled, class Add>
FUSEDOPT_FN void for_each_lanes(const Rows<Number, kRows, kIsScaled>& rows, int begin, int end, double* column_sums,
                                const Add& add) {
  int i = begin;
  for (; i + kLanes <= end; i += kLanes) add(rows, i, column_sums + i, std::false_type());
  if (i >= end) return;
  Number filled[kRows][kLanes] = {};
  Rows<Number, kRows, kIsScaled> last = rows;
  for (int r = 0; r < kRows; ++r) {
    memcpy(filled[r], rows.at[r] + i, sizeof(Number) * static_cast<size_t>(end - i));
    last.at[r] = filled[r];
  }
  Padded<double> sums(column_sums + i, end - i);
  add(last, 0, sums.at, std::true_type());
  memcpy(column_sums + i, sums.at, sizeof(double) * static_cast<size_t>(end - i));
}

// Rows that are weighed together, with the weighted sums of their columns.
template <class Number, bool kIsScaled>
class WeighedRows {
 public:
  WeighedRows(const Rows<Number, kWeighedRows, kIsScaled>& rows, const float* weights, double* column_sums)
      : rows_(rows), sums_(column_sums) {
    for (int r = 0; r < kWeighedRows; ++r) weights_[r] = weights[r];
  }
  // Adds the squares of the rows' numbers to the sums of their columns, each first multiplied by the weight of its row.
  FUSEDOPT_FN void add(int begin, int end) const {
    for_each_lanes(rows_, begin, end, sums_, [&](const auto& numbers, int column, double* sums, auto) {
      const auto square = [&](int r) {
        const WideFloats weighed = numbers.lanes(r, column) * weights_[r];
        return weighed * weighed;
      };
      static_assert(kWeighedRows == 4);
      const DoubleLanes added = widen((square(0) + square(1)) + (square(2) + square(3)));
      store(load_as<DoubleLanes>(sums) + added, sums);
    });
  }

 private:
  Rows<Number, kWeighedRows, kIsScaled> rows_;
  float weights_[kWeighedRows];
  double* sums_;
};

// Adds the squares of n numbers of a row to the sums of their row and of their columns, and those of their weights, if
// any, to theirs; at the same time it weighs `weighed` columns of a group. All of this is one loop, because in a loop
// of its own each addition would wait for the one before it, and memory would wait for the arithmetic.
template <class Row, class Weight, class Group>
FUSEDOPT_FN void add_row(const Row& row, const Weight* weights, int n, DoubleLanes& row_sum, DoubleLanes& weight_sum,
                         double* column_sums, const Group& group, int weighed) {
  constexpr int kPace = kWeighedRows * kLanes;  // columns of a row for every 16 of a group
  DoubleLanes held = row_sum, held_weights = weight_sum;
  const auto add = [&](const auto& numbers, int column, double* columns, auto is_filled) {
    const auto add_half = [&](int half, Doubles& lanes) {
      const Doubles values = widen(numbers.half(0, column + half));
      store(add_square(load_as<Doubles>(columns + half), values), columns + half);
      lanes = add_square(lanes, values);
    };
    add_half(0, held.low);
    add_half(kHalfLanes, held.high);
    if constexpr (!std::is_void_v<Weight>) {
      if constexpr (is_filled) {
        const int left = n % kLanes;
        add_squares(held_weights, Padded<Weight>(weights + n - left, left).at);
      } else {
        add_squares(held_weights, weights + column);
      }
    }
  };
  int i = 0, done = 0;
  for (; i + kPace <= n; i += kPace) {
    prefetch_after<kPace>(row.at[0] + i);
    if constexpr (!std::is_void_v<Weight>) prefetch_after<kPace>(weights + i);
#pragma GCC unroll 1  // unrolled, SSE2 runs out of registers
    for (int k = i; k < i + kPace; k += kLanes) add(row, k, column_sums + k, std::false_type());
    if (done + kLanes > weighed) continue;
    group.add(done, done + kLanes);
    done += kLanes;
  }
  for_each_lanes(row, i, n, column_sums, add);
  group.add(done, weighed);
  row_sum = held;
  weight_sum = held_weights;
}

template <class Number, int kRows, class Use>
FUSEDOPT_FN void use_rows(const Number* const (&at)[kRows], float multiplier, const Use& use) {
  Rows<Number, kRows, false> rows{{}, multiplier};
  Rows<Number, kRows, true> scaled{{}, multiplier};
  for (int r = 0; r < kRows; ++r) rows.at[r] = scaled.at[r] = at[r];
  multiplier == 1.0f ? use(rows) : use(scaled);
}

// Elements that follow each other, at most max_run of them.
struct Run {
  int64_t begin = 0;
  int n = 0;  // 0: zeros instead
};

// float32 and bfloat16 are read where they lie, others decoded into a tile.
FUSEDOPT_FN int64_t max_run(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kBFloat16 ? kReductionChunk : kTile;
}

alignas(64) const float kZeros[kReductionChunk] = {};

// Calls use(rows) for some runs of gradients, in float32 or bfloat16.
template <int kRows, class Use>
FUSEDOPT_FN void with_rows(const TensorDesc& tensor, float multiplier, const Run (&runs)[kRows], const Use& use) {
  if (tensor.grad.dtype == DType::kBFloat16) {
    const uint16_t* rows[kRows];
    for (int r = 0; r < kRows; ++r) {
      rows[r] = runs[r].n > 0 ? at<uint16_t>(tensor.grad, runs[r].begin) : reinterpret_cast<const uint16_t*>(kZeros);
    }
    use_rows(rows, multiplier, use);
  } else {
    alignas(64) float tiles[kRows][kTile];
    const float* rows[kRows];
    for (int r = 0; r < kRows; ++r) {
      rows[r] = runs[r].n > 0 ? load(tensor.grad, runs[r].begin, runs[r].n, tiles[r]) : kZeros;
    }
    use_rows(rows, multiplier, use);
  }
}

}  // namespace
}  // namespace fusedopt

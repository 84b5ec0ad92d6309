// The passes over a tensor that come before the step of a rule that normalizes (rules/normalize.h): sums of squares
// of gradients along rows and columns, of weights, of updates. The order of additions is that of
// fusedopt/reference/factored.py: fixed by the shape, so that neither threads nor instruction sets change it.
#pragma once

#include "cpu/formats.inl"
#include "cpu/kernels.h"
#include "cpu/reduce.inl"
#include "rules/normalize.h"

namespace fusedopt {
namespace {

constexpr int kRowsAtOnce = 4;  // share the loads and stores of column sums

// Sums of squares of kRows rows from `row`, of the columns that a unit has of them.
template <int kRows>
FUSEDOPT_FN void sum_some_rows(const TensorDesc& tensor, float multiplier, const MatrixUnit& unit, int64_t row,
                               double* row_sums, int64_t row_stride, double* column_sums) {
  alignas(64) float tiles[kRows][kTile];
  const int64_t width = unit.column_end - unit.column_begin;
  DoubleLanes lanes[kRows] = {};
  for (int64_t at = 0; at < width; at += kTile) {
    const int n = static_cast<int>(width - at < kTile ? width - at : kTile);
    const float* g[kRows];
    for (int r = 0; r < kRows; ++r) {
      const int64_t begin = (unit.matrix_row + row + r) * tensor.factors.column_count + unit.column_begin + at;
      g[r] = load(tensor.grad, begin, n, tiles[r]);
    }
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      DoubleLanes columns;
      memcpy(&columns, column_sums + at + i, sizeof columns);
      for (int r = 0; r < kRows; ++r) add_row(g[r] + i, multiplier, lanes[r], columns);
      memcpy(column_sums + at + i, &columns, sizeof columns);
    }
    if (i < n) {
      const size_t left = static_cast<size_t>(n - i);
      DoubleLanes columns = {};
      memcpy(&columns, column_sums + at + i, sizeof(double) * left);
      for (int r = 0; r < kRows; ++r) {
        float padded[kLanes] = {};
        memcpy(padded, g[r] + i, sizeof(float) * left);
        add_row(padded, multiplier, lanes[r], columns);
      }
      memcpy(column_sums + at + i, &columns, sizeof(double) * left);
    }
  }
  for (int r = 0; r < kRows; ++r) row_sums[r * row_stride] = total_of(lanes[r]);
}

// Sums of squares of a unit: of its rows to row_sums[0], [row_stride], ... and of its columns, added row by row.
void sum_rows_and_columns(const TensorDesc& tensor, float multiplier, const MatrixUnit& unit, double* row_sums,
                          int64_t row_stride, double* column_sums) {
  memset(column_sums, 0, sizeof(double) * static_cast<size_t>(unit.column_end - unit.column_begin));
  int64_t row = unit.row_begin;
  for (; row + kRowsAtOnce <= unit.row_end; row += kRowsAtOnce, row_sums += kRowsAtOnce * row_stride) {
    sum_some_rows<kRowsAtOnce>(tensor, multiplier, unit, row, row_sums, row_stride, column_sums);
  }
  for (; row < unit.row_end; ++row, row_sums += row_stride) {
    sum_some_rows<1>(tensor, multiplier, unit, row, row_sums, row_stride, column_sums);
  }
}

double sum(const float* x, int64_t n) {
  DoubleLanes sums = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    FloatLanes loaded = {};
    memcpy(&loaded, x + i, sizeof(float) * static_cast<size_t>(n - i < kLanes ? n - i : kLanes));
    sums += __builtin_convertvector(loaded, DoubleLanes);
  }
  return total_of(sums);
}

double sum_weights(const TensorDesc& tensor, int64_t begin, int64_t length) {
  alignas(64) float tile[kTile], spare[kTile];
  LaneSum sum;
  for (int64_t at = begin; at < begin + length; at += kTile) {
    const int n = static_cast<int>(begin + length - at < kTile ? begin + length - at : kTile);
    sum.add_squares(load_param(tensor, at, n, tile, spare), n);
  }
  return sum.total();
}

template <bool kClamped>
FUSEDOPT_FN void normalize_run(const float* g, float multiplier, float row, const float* columns, int n,
                               const Moments& moments, float* u) {
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) u[i] = normalize<kClamped>(g[i] * multiplier, row, columns[i], moments);
}

template <bool kClamped>
FUSEDOPT_FN void normalize_run(const float* g, float multiplier, const float* second, int n, const Moments& moments,
                               float* u) {
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) u[i] = normalize<kClamped>(g[i] * multiplier, second[i], moments);
}

// Where a run of elements lies in the matrices of a tensor.
struct MatrixPlace {
  int64_t row, column;  // rows counted through all matrices

  static MatrixPlace of(const Factors& factors, int64_t at) {
    if (!factors.exist()) return {0, 0};
    return {at / factors.column_count, at % factors.column_count};
  }
};

// u of n elements from `place`, which moves on behind them.
void normalize_matrix(const TensorDesc& tensor, const Moments& moments, float multiplier, const float* g, int n,
                      MatrixPlace& place, float* u) {
  const Factors& factors = tensor.factors;
  const NormalizeScratch& scratch = *tensor.scratch;
  for (int done = 0; done < n;) {
    const int64_t left = factors.column_count - place.column;
    const int count = left < n - done ? static_cast<int>(left) : n - done;
    const int64_t matrix = factors.row_count == scratch.row_total ? 0 : place.row / factors.row_count;
    const float* columns = scratch.column_factors + matrix * factors.column_count + place.column;
    const float row = scratch.row_factors[place.row];
    if (moments.is_clamped) {
      normalize_run<true>(g + done, multiplier, row, columns, count, moments, u + done);
    } else {
      normalize_run<false>(g + done, multiplier, row, columns, count, moments, u + done);
    }
    done += count;
    place.column += count;
    if (place.column == factors.column_count) {
      place.column = 0;
      ++place.row;
    }
  }
}

void normalize_vector(const Moments& moments, float multiplier, const float* g, const float* second, int n, float* u) {
  if (moments.is_clamped) {
    normalize_run<true>(g, multiplier, second, n, moments, u);
  } else {
    normalize_run<false>(g, multiplier, second, n, moments, u);
  }
}

// The sum of u u over a unit: lanes run through all of its rows.
double sum_matrix_updates(const TensorDesc& tensor, const Moments& moments, float multiplier, const MatrixUnit& unit) {
  alignas(64) float grad_tile[kTile], u[kTile];
  const int64_t columns = tensor.factors.column_count;
  LaneSum sum;
  for (int64_t row = unit.matrix_row + unit.row_begin; row < unit.matrix_row + unit.row_end; ++row) {
    for (int64_t column = unit.column_begin; column < unit.column_end; column += kTile) {
      const int n = static_cast<int>(unit.column_end - column < kTile ? unit.column_end - column : kTile);
      MatrixPlace place{row, column};
      normalize_matrix(tensor, moments, multiplier, load(tensor.grad, row * columns + column, n, grad_tile),
                       n, place, u);
      sum.add_squares(u, n);
    }
  }
  return sum.total();
}

// The same for elements with a second moment each, which is brought up to date on the way.
double sum_vector_updates(const TensorDesc& tensor, const Moments& moments, float multiplier, int state, int64_t begin,
                          int64_t length) {
  alignas(64) float grad_tile[kTile], u[kTile];
  LaneSum sum;
  for (int64_t at = begin; at < begin + length; at += kTile) {
    const int n = static_cast<int>(begin + length - at < kTile ? begin + length - at : kTile);
    const float* g = load(tensor.grad, at, n, grad_tile);
    float* second = fusedopt::at<float>(tensor.states[state], at);
    if (moments.is_clamped) {
#pragma GCC ivdep
      for (int i = 0; i < n; ++i) second[i] = second_moment<true>(second[i], g[i] * multiplier, moments);
    } else {
#pragma GCC ivdep
      for (int i = 0; i < n; ++i) second[i] = second_moment<false>(second[i], g[i] * multiplier, moments);
    }
    normalize_vector(moments, multiplier, g, second, n, u);
    sum.add_squares(u, n);
  }
  return sum.total();
}

}  // namespace
}  // namespace fusedopt

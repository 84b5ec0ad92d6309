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

FUSEDOPT_FN void add_weights(const TensorDesc& tensor, int64_t begin, int n, float* tile, float* spare, LaneSum& sum) {
  if (tensor.param.dtype == DType::kBFloat16 && tensor.master_format == Master::kNone) {
    sum.add_squares(at<uint16_t>(tensor.param, begin), n);
  } else {
    sum.add_squares(load_param(tensor, begin, n, tile, spare), n);
  }
}

// Adds the squares of 16 numbers of a row to the sums of their row and of their columns.
template <class Number>
FUSEDOPT_FN void add_lanes(const Number* x, float multiplier, DoubleLanes& row, double* column_sums) {
  for (int half = 0; half < kLanes; half += kHalfLanes) {
    const Doubles values = widen(load_floats(x + half) * multiplier);
    Doubles columns;
    memcpy(&columns, column_sums + half, sizeof columns);
    columns = add_square(columns, values);
    memcpy(column_sums + half, &columns, sizeof columns);
    Doubles& lanes = half == 0 ? row.low : row.high;
    lanes = add_square(lanes, values);
  }
}

template <class Number>
FUSEDOPT_FN void add_row(const Number* x, float multiplier, int n, DoubleLanes& row, double* column_sums) {
  DoubleLanes held = row;
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) add_lanes(x + i, multiplier, held, column_sums + i);
  if (i < n) {
    Padded<double> columns(column_sums + i, n - i);
    add_lanes(Padded<Number>(x + i, n - i).at, multiplier, held, columns.at);
    memcpy(column_sums + i, columns.at, sizeof(double) * static_cast<size_t>(n - i));
  }
  row = held;
}

// The sums of squares of a unit: of gradients along its rows, to row_sums[0], [row_stride], ..., and its columns, row
// by row; and, if asked for, of weights, returned. Two streams of memory at once come in faster than one after the
// other.
double sum_rows_and_columns(const TensorDesc& tensor, float multiplier, const MatrixUnit& unit, bool reads_weights,
                            double* row_sums, int64_t row_stride, double* column_sums) {
  alignas(64) float grad_tile[kTile], tile[kTile], spare[kTile];
  const int64_t width = unit.column_end - unit.column_begin;
  memset(column_sums, 0, sizeof(double) * static_cast<size_t>(width));
  LaneSum weights;
  for (int64_t row = unit.row_begin; row < unit.row_end; ++row, row_sums += row_stride) {
    DoubleLanes lanes;
    const int64_t begin = (unit.matrix_row + row) * tensor.factors.column_count + unit.column_begin;
    for (int64_t at = 0; at < width; at += kTile) {
      const int n = static_cast<int>(width - at < kTile ? width - at : kTile);
      if (tensor.grad.dtype == DType::kBFloat16) {
        add_row(fusedopt::at<uint16_t>(tensor.grad, begin + at), multiplier, n, lanes, column_sums + at);
      } else {
        add_row(load(tensor.grad, begin + at, n, grad_tile), multiplier, n, lanes, column_sums + at);
      }
      if (reads_weights) add_weights(tensor, begin + at, n, tile, spare, weights);
    }
    *row_sums = total_of(lanes);
  }
  return weights.total();
}

double sum(const float* x, int64_t n) {
  DoubleLanes sums;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Padded<float> padded(x + i, static_cast<int>(n - i < kLanes ? n - i : kLanes));
    sums.low += widen(load_floats(padded.at));
    sums.high += widen(load_floats(padded.at + kHalfLanes));
  }
  return total_of(sums);
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

// u of eight elements of a row, without a clamp.
template <class Number>
FUSEDOPT_FN Floats updates(const Number* g, float multiplier, float row, const float* columns) {
  return (row * load_floats(columns)) * (load_floats(g) * multiplier);
}

// Adds u u of n elements of a row to 16 lanes: u is not stored in between.
template <class Number>
FUSEDOPT_FN void add_updates(const Number* g, float multiplier, float row, const float* columns, int n,
                             DoubleLanes& sums) {
  DoubleLanes held = sums;
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    held.low = add_square(held.low, widen(updates(g + i, multiplier, row, columns + i)));
    held.high = add_square(held.high, widen(updates(g + i + kHalfLanes, multiplier, row, columns + i + kHalfLanes)));
  }
  if (i < n) {
    // Past the end there is 0, but not times a factor, which may be inf.
    const Padded<Number> padded(g + i, n - i);
    const Padded<float> factors(columns + i, n - i);
    float u[kLanes];
    for (int half = 0; half < kLanes; half += kHalfLanes) {
      const Floats values = updates(padded.at + half, multiplier, row, factors.at + half);
      memcpy(u + half, &values, sizeof values);
    }
    add_squares(held, Padded<float>(u, n - i).at);
  }
  sums = held;
}

// The sum of u u over a unit: lanes run through all of its rows.
double sum_matrix_updates(const TensorDesc& tensor, const Moments& moments, float multiplier, const MatrixUnit& unit) {
  alignas(64) float grad_tile[kTile], u[kTile];
  const NormalizeScratch& scratch = *tensor.scratch;
  const int64_t column_count = tensor.factors.column_count;
  const float* factors = scratch.column_factors + unit.matrix_row / tensor.factors.row_count * column_count;
  LaneSum sum;
  for (int64_t row = unit.matrix_row + unit.row_begin; row < unit.matrix_row + unit.row_end; ++row) {
    const float row_factor = scratch.row_factors[row];
    for (int64_t column = unit.column_begin; column < unit.column_end; column += kTile) {
      const int n = static_cast<int>(unit.column_end - column < kTile ? unit.column_end - column : kTile);
      const int64_t begin = row * column_count + column;
      const float* columns = factors + column;
      if (moments.is_clamped) {
        const float* g = load(tensor.grad, begin, n, grad_tile);
        normalize_run<true>(g, multiplier, row_factor, columns, n, moments, u);
        sum.add_squares(u, n);
      } else if (tensor.grad.dtype == DType::kBFloat16) {
        add_updates(at<uint16_t>(tensor.grad, begin), multiplier, row_factor, columns, n, sum.sums);
      } else {
        add_updates(load(tensor.grad, begin, n, grad_tile), multiplier, row_factor, columns, n, sum.sums);
      }
    }
  }
  return sum.total();
}

// The same for elements with a second moment each, which is brought up to date on the way; and, where `weights` is not
// null, the sum of their squares.
double sum_vector_updates(const TensorDesc& tensor, const Moments& moments, float multiplier, int state, int64_t begin,
                          int64_t length, double* weights) {
  alignas(64) float grad_tile[kTile], u[kTile];
  alignas(64) float tile[kTile], spare[kTile];
  LaneSum sum, weight_sum;
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
    if (weights != nullptr) add_weights(tensor, at, n, tile, spare, weight_sum);
  }
  if (weights != nullptr) *weights = weight_sum.total();
  return sum.total();
}

}  // namespace
}  // namespace fusedopt

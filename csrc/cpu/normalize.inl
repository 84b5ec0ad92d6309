// What is read of a tensor before the step of a rule that normalizes (rules/normalize.h): sums of squares
// of gradients along rows and columns, of weights, of updates. The order of additions is that of
// fusedopt/reference/factored.py: fixed by the shape, so that neither threads nor instruction sets change it.
#pragma once

#include "core/pairwise.h"
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

// Adds the squares of 16 numbers of a row, times the row's weight, to sums of their columns.
template <class Number>
FUSEDOPT_FN void add_weighted_lanes(const Number* x, float multiplier, double weight, double* column_sums) {
  for (int half = 0; half < kLanes; half += kHalfLanes) {
    const Doubles values = widen(load_floats(x + half) * multiplier);
    Doubles columns;
    memcpy(&columns, column_sums + half, sizeof columns);
    columns = columns + values * values * weight;
    memcpy(column_sums + half, &columns, sizeof columns);
  }
}

// Calls add(numbers, column sums) for each 16 of n numbers, the last filled up with zeros.
template <class Number, class Add>
FUSEDOPT_FN void for_each_lanes(const Number* x, int n, double* column_sums, const Add& add) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) add(x + i, column_sums + i);
  if (i == n) return;
  Padded<double> columns(column_sums + i, n - i);
  add(Padded<Number>(x + i, n - i).at, columns.at);
  memcpy(column_sums + i, columns.at, sizeof(double) * static_cast<size_t>(n - i));
}

// Calls add(16 numbers, column sums) for n gradients from `begin`, in float32 or bfloat16.
template <class Add>
FUSEDOPT_FN void for_each_lanes(const Buffer& grad, int64_t begin, int n, double* column_sums, const Add& add) {
  alignas(64) float tile[kTile];
  if (grad.dtype == DType::kBFloat16) {
    for_each_lanes(at<uint16_t>(grad, begin), n, column_sums, add);
  } else {
    for_each_lanes(static_cast<const float*>(load(grad, begin, n, tile)), n, column_sums, add);
  }
}

// Calls use(begin, end) for the pieces of a range that are `length` long, but for the last.
template <class Use>
FUSEDOPT_FN void for_each_piece(int64_t begin, int64_t end, int64_t length, const Use& use) {
  for (; begin < end; begin += length) use(begin, end - begin < length ? end : begin + length);
}

// Asks for n elements to come to the second-level cache. The hardware's own prefetching stops while a row's sums are
// worked on in cache: on Zen 4 this makes the first pass 13 % faster (to the first level: nothing gained).
FUSEDOPT_FN void prefetch(const Buffer& buffer, int64_t begin, int n) {
  const char* first = static_cast<const char*>(buffer.data) + begin * size_of(buffer.dtype);
  for (int64_t i = 0; i < n * size_of(buffer.dtype); i += 64) __builtin_prefetch(first + i, 0, 2);
}

// What a row adds to the sums of its unit. Where that has whole rows, the row's average is brought up to date; and
// while the gradients are in cache and the weights come in from memory, weighted sums are taken.
void sum_row(const TensorDesc& tensor, const Moments& moments, float multiplier, const MatrixUnit& unit, int64_t row,
             const UnitSums& sums) {
  alignas(64) float tile[kTile], spare[kTile];
  const int64_t begin = (unit.matrix_row + row) * tensor.factors.column_count + unit.column_begin;
  const int64_t width = unit.column_end - unit.column_begin;
  double panel_sums[kMaxPanels];
  int panels = 0;
  for_each_piece(0, width, kReductionChunk, [&](int64_t panel, int64_t panel_end) {
    DoubleLanes lanes;
    for_each_piece(panel, panel_end, kTile, [&](int64_t column, int64_t end) {
      const int n = static_cast<int>(end - column);
      if (sums.weights != nullptr) prefetch(tensor.param, begin + column, n);
      for_each_lanes(tensor.grad, begin + column, n, sums.columns + column,
                     [&](const auto* x, double* columns) { add_lanes(x, multiplier, lanes, columns); });
    });
    panel_sums[panels++] = total_of(lanes);
  });

  double weight = 0.0;
  if (unit.has_whole_rows) {
    float& average = tensor.factors.rows[unit.matrix_row + row];
    average = moved_average(average, pairwise_sum(panel_sums, panels), width, moments);
    weight = 1.0 / static_cast<double>(average);
  } else {
    sums.rows[(row - unit.row_begin) * sums.row_stride] = panel_sums[0];
  }
  for_each_piece(0, width, kReductionChunk, [&](int64_t panel, int64_t panel_end) {
    LaneSum weights;
    for_each_piece(panel, panel_end, kTile, [&](int64_t column, int64_t end) {
      const int n = static_cast<int>(end - column);
      if (sums.weights != nullptr) add_weights(tensor, begin + column, n, tile, spare, weights);
      prefetch(tensor.grad, begin + tensor.factors.column_count + column, n);
      if (sums.weighted == nullptr) return;
      for_each_lanes(tensor.grad, begin + column, n, sums.weighted + column,
                     [&](const auto* x, double* columns) { add_weighted_lanes(x, multiplier, weight, columns); });
    });
    if (sums.weights != nullptr) sums.weights[panel / kReductionChunk] += weights.total();
  });
}

// First pass over a unit.
void sum_unit(const TensorDesc& tensor, const Moments& moments, float multiplier, const MatrixUnit& unit,
              const UnitSums& sums) {
  const int64_t width = unit.column_end - unit.column_begin;
  const int64_t panels = (width + kReductionChunk - 1) / kReductionChunk;
  memset(sums.columns, 0, sizeof(double) * static_cast<size_t>(width));
  if (sums.weighted != nullptr) memset(sums.weighted, 0, sizeof(double) * static_cast<size_t>(width));
  if (sums.weights != nullptr) memset(sums.weights, 0, sizeof(double) * static_cast<size_t>(panels));
  for (int64_t row = unit.row_begin; row < unit.row_end; ++row) sum_row(tensor, moments, multiplier, unit, row, sums);
}

// The weighted sums of the columns of a unit, once the averages of its rows are known.
void sum_weighted(const TensorDesc& tensor, float multiplier, const MatrixUnit& unit, double* weighted) {
  const int64_t width = unit.column_end - unit.column_begin;
  memset(weighted, 0, sizeof(double) * static_cast<size_t>(width));
  for (int64_t row = unit.matrix_row + unit.row_begin; row < unit.matrix_row + unit.row_end; ++row) {
    const int64_t begin = row * tensor.factors.column_count + unit.column_begin;
    const double weight = 1.0 / static_cast<double>(tensor.factors.rows[row]);
    for_each_piece(0, width, kTile, [&](int64_t column, int64_t end) {
      const int n = static_cast<int>(end - column);
      for_each_lanes(tensor.grad, begin + column, n, weighted + column,
                     [&](const auto* x, double* columns) { add_weighted_lanes(x, multiplier, weight, columns); });
    });
  }
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

// The sum of u u over a unit where moments are clamped, row by row. Without a clamp it needs no pass of its own: it is
// the sum over columns of their weighted sums divided by their averages, times the mean of the rows' averages.
double sum_matrix_updates(const TensorDesc& tensor, const Moments& moments, float multiplier, const MatrixUnit& unit) {
  alignas(64) float grad_tile[kTile], u[kTile];
  const NormalizeScratch& scratch = *tensor.scratch;
  const int64_t column_count = tensor.factors.column_count;
  const float* factors = scratch.column_factors + unit.matrix_row / tensor.factors.row_count * column_count;
  double total = 0.0;
  for (int64_t row = unit.matrix_row + unit.row_begin; row < unit.matrix_row + unit.row_end; ++row) {
    LaneSum sum;
    for (int64_t column = unit.column_begin; column < unit.column_end; column += kTile) {
      const int n = static_cast<int>(unit.column_end - column < kTile ? unit.column_end - column : kTile);
      const float* g = load(tensor.grad, row * column_count + column, n, grad_tile);
      normalize_run<true>(g, multiplier, scratch.row_factors[row], factors + column, n, moments, u);
      sum.add_squares(u, n);
    }
    total += sum.total();
  }
  return total;
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

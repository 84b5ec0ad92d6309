// What is read of a tensor before the step of a rule that normalizes (rules/normalize.h): sums of squares
// of gradients along rows and columns, of weights and of updates. The order of additions is that of
// fusedopt/reference/factored.py: fixed by the shape, so that neither threads nor instruction sets change it.
#pragma once

#include <algorithm>

#include "core/matrices.h"
#include "core/pairwise.h"
#include "cpu/formats.inl"
#include "cpu/kernels.h"
#include "cpu/reduce.inl"
#include "cpu/rows.inl"
#include "rules/normalize.h"

namespace fusedopt {
namespace {

// Calls use(weights) with n weights in full precision, in float32 or bfloat16.
template <class Use>
FUSEDOPT_FN void with_weights(const TensorDesc& tensor, int64_t begin, int n, const Use& use) {
  alignas(64) float tile[kTile], spare[kTile];
  if (tensor.param.dtype == DType::kBFloat16 && tensor.master_format == Master::kNone) {
    use(at<uint16_t>(tensor.param, begin));
  } else {
    use(static_cast<const float*>(load_param(tensor, begin, n, tile, spare)));
  }
}

// Calls use(begin, end) for the pieces of a range, all of them `length` long but perhaps the last.
template <class Use>
FUSEDOPT_FN void for_each_piece(int64_t begin, int64_t end, int64_t length, const Use& use) {
  for (; begin < end; begin += length) use(begin, end - begin < length ? end : begin + length);
}

// Rows of a unit that are weighed together.
struct RowGroup {
  int64_t row = 0;  // the first
  int count = 0;
  float weights[kWeighedRows] = {};

  RowGroup(const MatrixUnit& unit, int64_t first)
      : row(first), count(static_cast<int>(std::clamp<int64_t>(unit.row_end - first, 0, kWeighedRows))) {}

  // Once the averages of the rows are known.
  FUSEDOPT_FN void weigh(const TensorDesc& tensor, const MatrixUnit& unit) {
    for (int r = 0; r < count; ++r) weights[r] = weight_of_row(tensor.factors.rows[unit.matrix_row + row + r]);
  }
};

FUSEDOPT_FN int64_t element_at(const TensorDesc& tensor, const MatrixUnit& unit, int64_t row, int64_t column) {
  return (unit.matrix_row + row) * tensor.factors.column_count + unit.column_begin + column;
}

// n columns of a group of rows, with their weighted sums.
struct Weighing {
  const RowGroup* group;
  int64_t column = 0;
  int n = 0;  // 0: none
  double* sums = nullptr;

  // The elements of row r of the group in these columns.
  FUSEDOPT_FN Run run(const TensorDesc& tensor, const MatrixUnit& unit, int r) const {
    if (n == 0 || r >= group->count) return {};
    return {element_at(tensor, unit, group->row + r, column), n};
  }
};

template <class Number, int kRows, bool kIsScaled>
FUSEDOPT_FN WeighedRows<Number, kIsScaled> weighed_rows(const Rows<Number, kRows, kIsScaled>& rows,
                                                        const Weighing& part) {
  return {rows.template pick<kRows - kWeighedRows, kWeighedRows>(), part.group->weights, part.sums};
}

void weigh(const TensorDesc& tensor, float multiplier, const MatrixUnit& unit, const Weighing& part) {
  if (part.n == 0) return;
  Run runs[kWeighedRows];
  for (int r = 0; r < kWeighedRows; ++r) runs[r] = part.run(tensor, unit, r);
  with_rows(tensor, multiplier, runs, [&](const auto& rows) { weighed_rows(rows, part).add(0, part.n); });
}

// Adds a row to the sums of its unit, in pieces of a given length. `meanwhile(column, n)` says for each piece what is
// weighed at the same time.
template <class Meanwhile>
FUSEDOPT_FN void sum_row(const TensorDesc& tensor, const Moments& moments, float multiplier, const MatrixUnit& unit,
                         int64_t row, int64_t length, const UnitSums& sums, const Meanwhile& meanwhile) {
  const int64_t width = unit.column_end - unit.column_begin;
  double panel_sums[kMaxPanels] = {};
  for_each_piece(0, width, kReductionChunk, [&](int64_t panel, int64_t panel_end) {
    DoubleLanes row_sum, weight_sum;
    for_each_piece(panel, panel_end, length, [&](int64_t column, int64_t end) {
      const int n = static_cast<int>(end - column);
      const int64_t begin = element_at(tensor, unit, row, column);
      const Weighing part = meanwhile(column, n);
      Run runs[1 + kWeighedRows] = {{begin, n}};
      for (int r = 0; r < kWeighedRows; ++r) runs[1 + r] = part.run(tensor, unit, r);
      const auto add = [&](const auto* weights) {
        with_rows(tensor, multiplier, runs, [&](const auto& rows) {
          add_row(rows.template pick<0, 1>(), weights, n, row_sum, weight_sum, sums.columns + column,
                  weighed_rows(rows, part), part.n);
        });
      };
      if (sums.weights != nullptr) {
        with_weights(tensor, begin, n, add);
      } else {
        add(static_cast<const void*>(nullptr));
      }
    });
    panel_sums[panel / kReductionChunk] = total_of(row_sum);
    if (sums.weights != nullptr) sums.weights[panel / kReductionChunk] += total_of(weight_sum);
  });
  if (unit.has_whole_rows) {
    float& average = tensor.factors.rows[unit.matrix_row + row];
    average = moved_average(average, pairwise_sum(panel_sums, chunks_of(width)), width, moments);
  } else {
    sums.rows[(row - unit.row_begin) * sums.row_stride] = panel_sums[0];
  }
}

// First pass over a unit. If it has whole rows, their averages are updated, and each group of four rows is weighed in
// quarters, one quarter while each of the next four rows is read.
void sum_unit(const TensorDesc& tensor, const Moments& moments, float multiplier, const MatrixUnit& unit,
              const UnitSums& found) {
  const int64_t width = unit.column_end - unit.column_begin;
  UnitSums sums = found;
  double weight_sums[kMaxPanels] = {};  // in place they would share a cache line with other threads' sums
  if (found.weights != nullptr) sums.weights = weight_sums;
  memset(sums.columns, 0, sizeof(double) * static_cast<size_t>(width));
  if (sums.weighted != nullptr) memset(sums.weighted, 0, sizeof(double) * static_cast<size_t>(width));
  const int64_t weight_run = tensor.master_format == Master::kNone ? max_run(tensor.param.dtype) : kTile;
  const int64_t length = std::min(max_run(tensor.grad.dtype), sums.weights == nullptr ? kReductionChunk : weight_run);
  RowGroup last(unit, unit.row_end);  // none
  const auto quarter = [&](int part, int64_t column, int n) -> Weighing {
    const int count = static_cast<int>(divided_up(n, kWeighedRows * kLanes)) * kLanes, first = part * count;
    if (last.count == 0 || first >= n) return {&last};
    return {&last, column + first, std::min(count, n - first), sums.weighted + column + first};
  };
  for (int64_t row = unit.row_begin; row < unit.row_end; row += kWeighedRows) {
    RowGroup next(unit, row);
    for (int r = 0; r < next.count; ++r) {
      sum_row(tensor, moments, multiplier, unit, row + r, length, sums,
              [&](int64_t column, int n) { return quarter(r, column, n); });
    }
    // Quarters for which there was no row.
    for (int part = next.count; part < kWeighedRows; ++part) {
      for_each_piece(0, width, length, [&](int64_t column, int64_t end) {
        weigh(tensor, multiplier, unit, quarter(part, column, static_cast<int>(end - column)));
      });
    }
    if (sums.weighted == nullptr) continue;
    next.weigh(tensor, unit);
    last = next;
  }
  if (found.weights != nullptr) std::copy_n(weight_sums, chunks_of(width), found.weights);
  if (sums.weighted == nullptr) return;
  for_each_piece(0, width, length, [&](int64_t column, int64_t end) {
    weigh(tensor, multiplier, unit, {&last, column, static_cast<int>(end - column), sums.weighted + column});
  });
}

// The weighted sums of the columns of a unit, once the averages of its rows are known.
void sum_weighted(const TensorDesc& tensor, float multiplier, const MatrixUnit& unit, double* weighted) {
  const int64_t width = unit.column_end - unit.column_begin;
  memset(weighted, 0, sizeof(double) * static_cast<size_t>(width));
  for (int64_t row = unit.row_begin; row < unit.row_end; row += kWeighedRows) {
    RowGroup group(unit, row);
    group.weigh(tensor, unit);
    for_each_piece(0, width, kTile, [&](int64_t column, int64_t end) {
      weigh(tensor, multiplier, unit, {&group, column, static_cast<int>(end - column), weighted + column});
    });
  }
}

double sum(const float* x, int64_t n) {
  DoubleLanes sums;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sums = sums + widen(load_wide(x + i));
  if (i < n) sums = sums + widen(load_wide(Padded<float>(x + i, static_cast<int>(n - i)).at));
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

// u of n elements from `place` on, which moves past them.
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

// The same for elements that have a second moment each, which is updated on the way; and the sum of squares of the
// weights, if `weights` is not null.
double sum_vector_updates(const TensorDesc& tensor, const Moments& moments, float multiplier, int state, int64_t begin,
                          int64_t length, double* weights) {
  alignas(64) float grad_tile[kTile], u[kTile];
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
    if (weights != nullptr) {
      with_weights(tensor, at, n, [&](const auto* numbers) { weight_sum.add_squares(numbers, n); });
    }
  }
  if (weights != nullptr) *weights = weight_sum.total();
  return sum.total();
}

// The same where the step brings second moments up to date: they are only read, in whatever format they have. `length`
// is at most kReductionChunk.
double sum_quotients(const TensorDesc& tensor, const Moments& moments, float multiplier, int state, int64_t begin,
                     int64_t length) {
  alignas(64) float grad_tile[kTile], second_tile[kTile], quotients[kBlock + kReductionChunk];
  float* const u = quotients + kBlock;  // of the chunk; before it is room for what is left of a block
  const Buffer& held = tensor.states[state];
  const int64_t end = begin + length;
  // Codes are decoded from where their block begins. Tiles end with rows, but lanes go on.
  for (int64_t at = held.is_blockwise() ? begin - begin % tensor.row % kBlock : begin; at < end;) {
    const int n = tile_length(tensor, held.is_blockwise(), at, end);
    const float* g = load(tensor.grad, at, n, grad_tile);
    const float* second = load_state(held, tensor.row, at, n, second_tile);
    float* const target = u + (at - begin);
#pragma GCC ivdep
    for (int i = 0; i < n; ++i) {
      const float grad = g[i] * multiplier;
      target[i] = normalize<true>(grad, second_moment<true>(second[i], grad, moments), moments);
    }
    at += n;
  }
  LaneSum sum;
  sum.add_squares(u, static_cast<int>(length));
  return sum.total();
}

}  // namespace
}  // namespace fusedopt

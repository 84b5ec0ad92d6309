// What is read of a tensor before the step of a rule that normalizes (rules/normalize.h): sums of squares
// of gradients along rows and columns, of weights, of updates. The order of additions is that of
// fusedopt/reference/factored.py: fixed by the shape, so that neither threads nor instruction sets change it.
#pragma once

#include <algorithm>
#include <type_traits>

#include "core/matrices.h"
#include "core/pairwise.h"
#include "cpu/formats.inl"
#include "cpu/kernels.h"
#include "cpu/reduce.inl"
#include "rules/normalize.h"

namespace fusedopt {
namespace {

constexpr int64_t kPage = 4096;  // bytes
constexpr int64_t kLinesAhead = 3072;

// Asks for what comes somewhat after the elements of a tile, line by line: for all of it at once, requests would wait
// for each other. And once a page for a number two pages on, to have its address translated in time, as hardware's own
// prefetching ends with a page. On Zen 4, with pages of 4 KiB, a thread reads two tensors in .34 ns per element
// instead of .41.
class Prefetch {
 public:
  Prefetch(const Buffer& buffer, int64_t begin)
      : first_(static_cast<const char*>(buffer.data) + begin * size_of(buffer.dtype)), size_(size_of(buffer.dtype)) {
    const bool begins_page = reinterpret_cast<uintptr_t>(first_) % kPage < static_cast<uintptr_t>(kTile * size_);
    if (begins_page) __builtin_prefetch(first_ + 2 * kPage);
  }
  FUSEDOPT_FN void after(int element) const { __builtin_prefetch(first_ + kLinesAhead + element * size_); }

 private:
  const char* first_;
  int64_t size_;
};

// Calls use(weights) with n weights in full precision, in float32 or bfloat16.
template <class Use>
FUSEDOPT_FN void with_weights(const TensorDesc& tensor, int64_t begin, int n, const Use& use) {
  alignas(64) float tile[kTile], spare[kTile];
  if (tensor.param.dtype == DType::kBFloat16 && tensor.master_format == Master::kNone) {
    use(at<uint16_t>(tensor.param, begin));
  } else if (tensor.param.dtype == DType::kFloat32) {
    use(at<float>(tensor.param, begin));
  } else {
    use(static_cast<const float*>(load_param(tensor, begin, n, tile, spare)));
  }
}

// Columns of some rows of a matrix, times a multiplier unless that is 1, as it mostly is: AVX-512 can convert to double
// what it reads as it is.
template <class Number, int kRows, bool kIsScaled>
struct Rows {
  const Number* at[kRows];
  float multiplier;

  FUSEDOPT_FN Floats half(int row, int column) const { return scaled(load_floats(at[row] + column)); }
  FUSEDOPT_FN WideFloats lanes(int row, int column) const { return scaled(load_wide(at[row] + column)); }

 private:
  template <class Vector>
  FUSEDOPT_FN Vector scaled(const Vector& x) const {
    return kIsScaled ? x * multiplier : x;
  }
};

// Calls add(rows, first column, their sums, whether columns are filled up) for each 16 of n columns; the last are
// filled up with zeros.
template <class Number, int kRows, bool kIsScaled, class Add>
FUSEDOPT_FN void for_each_lanes(const Rows<Number, kRows, kIsScaled>& rows, int n, double* column_sums,
                                const Add& add) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) add(rows, i, column_sums + i, std::false_type());
  if (i == n) return;
  Number filled[kRows][kLanes] = {};
  Rows<Number, kRows, kIsScaled> last = rows;
  for (int r = 0; r < kRows; ++r) {
    memcpy(filled[r], rows.at[r] + i, sizeof(Number) * static_cast<size_t>(n - i));
    last.at[r] = filled[r];
  }
  Padded<double> sums(column_sums + i, n - i);
  add(last, 0, sums.at, std::true_type());
  memcpy(column_sums + i, sums.at, sizeof(double) * static_cast<size_t>(n - i));
}

// Adds the squares of n numbers of a row to the sums of their row and of their columns, and those of their weights, if
// any. All in one loop: alone, each sum would have the next addition wait for the last.
template <class Row, class Weight>
FUSEDOPT_FN void add_row(const Row& row, const Prefetch& next_row, const Weight* weights, const Prefetch& next_weights,
                         int n, DoubleLanes& row_sum, DoubleLanes& weight_sum, double* column_sums) {
  DoubleLanes held = row_sum, held_weights = weight_sum;
  for_each_lanes(row, n, column_sums, [&](const auto& numbers, int column, double* columns, auto is_filled) {
    if constexpr (!is_filled) next_row.after(column);
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
        next_weights.after(column);
        add_squares(held_weights, weights + column);
      }
    }
  });
  row_sum = held;
  weight_sum = held_weights;
}

// Adds to sums of columns the squares of what rows have there, each first multiplied by the weight of its row.
template <class WeighedRows>
FUSEDOPT_FN void add_weighted_rows(const WeighedRows& rows, int n, const float* weights, double* column_sums) {
  for_each_lanes(rows, n, column_sums, [&](const auto& numbers, int column, double* columns, auto) {
    const auto square = [&](int r) {
      const WideFloats weighed = numbers.lanes(r, column) * weights[r];
      return weighed * weighed;
    };
    static_assert(kWeighedRows == 4);
    const DoubleLanes added = widen((square(0) + square(1)) + (square(2) + square(3)));
    store(load_as<DoubleLanes>(columns) + added, columns);
  });
}

template <class Number, int kRows, class Use>
FUSEDOPT_FN void use_rows(const Number* const (&at)[kRows], float multiplier, const Use& use) {
  Rows<Number, kRows, false> rows{{}, multiplier};
  Rows<Number, kRows, true> scaled{{}, multiplier};
  for (int r = 0; r < kRows; ++r) rows.at[r] = scaled.at[r] = at[r];
  multiplier == 1.0f ? use(rows) : use(scaled);
}

// Calls use(rows) for n columns, at most a tile, of `count` rows from element `begin` on, in float32 or bfloat16, and
// of rows of zeros behind them.
template <int kRows, class Use>
FUSEDOPT_FN void with_rows(const TensorDesc& tensor, float multiplier, int64_t begin, int n, int count,
                           const Use& use) {
  alignas(64) static const float kZeros[kTile] = {};
  const int64_t stride = tensor.factors.column_count;
  if (tensor.grad.dtype == DType::kBFloat16) {
    const uint16_t* rows[kRows];
    for (int r = 0; r < kRows; ++r) {
      rows[r] = r < count ? at<uint16_t>(tensor.grad, begin + r * stride) : reinterpret_cast<const uint16_t*>(kZeros);
    }
    use_rows(rows, multiplier, use);
  } else {
    alignas(64) float tiles[kRows][kTile];
    const float* rows[kRows];
    for (int r = 0; r < kRows; ++r) rows[r] = r < count ? load(tensor.grad, begin + r * stride, n, tiles[r]) : kZeros;
    use_rows(rows, multiplier, use);
  }
}

// Calls use(begin, end) for the pieces of a range that are `length` long, but for the last.
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

// Adds n columns of a group to their weighted sums.
FUSEDOPT_FN void add_weighted(const TensorDesc& tensor, float multiplier, const MatrixUnit& unit, const RowGroup& group,
                              int64_t column, int n, double* weighted) {
  const int64_t begin = element_at(tensor, unit, group.row, column);
  if (group.count == 0) return;
  with_rows<kWeighedRows>(tensor, multiplier, begin, n, group.count,
                          [&](const auto& rows) { add_weighted_rows(rows, n, group.weights, weighted + column); });
}

// What a row adds to the sums of its unit. `meanwhile(column, n)` is called for each tile: while numbers come in from
// memory there is time to work on others.
template <class Meanwhile>
FUSEDOPT_FN void sum_row(const TensorDesc& tensor, const Moments& moments, float multiplier, const MatrixUnit& unit,
                         int64_t row, const UnitSums& sums, const Meanwhile& meanwhile) {
  const int64_t width = unit.column_end - unit.column_begin;
  double panel_sums[kMaxPanels] = {};
  for_each_piece(0, width, kReductionChunk, [&](int64_t panel, int64_t panel_end) {
    DoubleLanes row_sum, weight_sum;
    for_each_piece(panel, panel_end, kTile, [&](int64_t column, int64_t end) {
      const int n = static_cast<int>(end - column);
      const int64_t begin = element_at(tensor, unit, row, column);
      const Prefetch next_row(tensor.grad, begin);
      const auto add = [&](const auto* weights, const Prefetch& next_weights) {
        with_rows<1>(tensor, multiplier, begin, n, 1, [&](const auto& numbers) {
          add_row(numbers, next_row, weights, next_weights, n, row_sum, weight_sum, sums.columns + column);
        });
      };
      if (sums.weights != nullptr) {
        const Prefetch next_weights(tensor.param, begin);
        with_weights(tensor, begin, n, [&](const auto* weights) { add(weights, next_weights); });
      } else {
        add(static_cast<const void*>(nullptr), next_row);
      }
      meanwhile(column, n);
    });
    panel_sums[panel / kReductionChunk] = total_of(row_sum);
    if (sums.weights != nullptr) sums.weights[panel / kReductionChunk] += total_of(weight_sum);
  });
  if (unit.has_whole_rows) {
    float& average = tensor.factors.rows[unit.matrix_row + row];
    average = moved_average(average, pairwise_sum(panel_sums, divided_up(width, kReductionChunk)), width, moments);
  } else {
    sums.rows[(row - unit.row_begin) * sums.row_stride] = panel_sums[0];
  }
}

// First pass over a unit. Where it has whole rows, their averages are brought up to date, and a group of rows is
// weighed in quarters, while each of the next four comes in.
void sum_unit(const TensorDesc& tensor, const Moments& moments, float multiplier, const MatrixUnit& unit,
              const UnitSums& found) {
  const int64_t width = unit.column_end - unit.column_begin;
  UnitSums sums = found;
  double weight_sums[kMaxPanels] = {};  // not where they belong, in a cache line with other threads' sums
  if (found.weights != nullptr) sums.weights = weight_sums;
  memset(sums.columns, 0, sizeof(double) * static_cast<size_t>(width));
  if (sums.weighted != nullptr) memset(sums.weighted, 0, sizeof(double) * static_cast<size_t>(width));
  RowGroup last(unit, unit.row_end);  // none
  const auto weigh_part = [&](int64_t column, int n, int part) {
    const int length = static_cast<int>(divided_up(n, kWeighedRows * kLanes)) * kLanes, first = part * length;
    if (last.count > 0 && first < n) {
      add_weighted(tensor, multiplier, unit, last, column + first, std::min(length, n - first), sums.weighted);
    }
  };
  for (int64_t row = unit.row_begin; row < unit.row_end; row += kWeighedRows) {
    RowGroup next(unit, row);
    for (int r = 0; r < next.count; ++r) {
      sum_row(tensor, moments, multiplier, unit, row + r, sums, [&](int64_t column, int n) {
        weigh_part(column, n, r);
        // Fewer rows than parts: the last of them takes the rest.
        for (int part = next.count; r == next.count - 1 && part < kWeighedRows; ++part) weigh_part(column, n, part);
      });
    }
    if (sums.weighted == nullptr) continue;
    next.weigh(tensor, unit);
    last = next;
  }
  if (found.weights != nullptr) std::copy_n(weight_sums, divided_up(width, kReductionChunk), found.weights);
  if (sums.weighted == nullptr) return;
  for_each_piece(0, width, kTile, [&](int64_t column, int64_t end) {
    add_weighted(tensor, multiplier, unit, last, column, static_cast<int>(end - column), sums.weighted);
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
      add_weighted(tensor, multiplier, unit, group, column, static_cast<int>(end - column), weighted);
    });
  }
}

double sum(const float* x, int64_t n) {
  DoubleLanes sums;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Padded<float> padded(x + i, static_cast<int>(n - i < kLanes ? n - i : kLanes));
    sums = sums + widen(load_wide(padded.at));
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

}  // namespace
}  // namespace fusedopt

// What is read of a tensor before the step of a rule that normalizes: the sums of cpu/normalize.inl, with the same
// additions in the same order, so the bits are the same. A row is summed by 16 threads, a column by one.
//
// Matrices with enough rows of few elements go through slab_kernel, which finds a row's sum and weighs what the row
// adds to its columns while its gradients are still in cache: they come from memory once. All others go through
// row_sum_kernel and column_sum_kernel, which spread over a device whatever the shape is.
#pragma once

#include "cuda/normalize_vectors.cuh"

namespace fusedopt::cuda {

constexpr int kSlabThreads = 384;
constexpr int kSlabRows = kSlabThreads / kSumLanes;  // that a block sums at a time
static_assert(kSlabRows % kWeighedRows == 0);
constexpr int kSlabColumns = 3;                               // of a thread
constexpr int kMaxSlabColumns = kSlabColumns * kSlabThreads;  // of a matrix whose slabs are taken whole
constexpr int kSumBlocks = 4;                   // of a multiprocessor; to have room for more, the compiler would spill
constexpr int kUnitsAtOnce = kSumThreads / 32;  // of a block that adds rows in order

namespace {

// The part of a row within a panel.
struct RowChunk {
  int64_t row, panel, begin;  // the row counted through all matrices
  int length;                 // 0 past the last one

  FUSEDOPT_DEVICE int64_t place(const NormalizedMatrix& m) const { return row * m.cut.panels + panel; }
};

FUSEDOPT_DEVICE RowChunk row_chunk(const NormalizedMatrix& m) {
  const int64_t i = thread_of(m) / kSumLanes;
  RowChunk chunk;
  chunk.row = i / m.cut.panels;
  chunk.panel = i - chunk.row * m.cut.panels;
  const int64_t column = chunk.panel * kReductionChunk;
  chunk.begin = chunk.row * m.cut.column_count + column;
  chunk.length = chunk.row < m.cut.rows() ? length_of_chunk(column, m.cut.column_count) : 0;
  return chunk;
}

// Brings the average of a row up to date. Returns the weight of the row in the sums of columns.
FUSEDOPT_DEVICE float move_row(const NormalizedMatrix& m, int64_t row, double square_sum, const Moments& moments) {
  const float average = moved_average(m.rows[row], square_sum, m.cut.column_count, moments);
  m.rows[row] = average;
  return weight_of_row(average);
}

// Adds rows to the weighted sum of a column: the squares of four rows in pairs, as they come.
struct WeighedColumn {
  double sum = 0.0;
  float first = 0.0f, second = 0.0f;

  // `row` counts from a multiple of four; the compiler knows it, or sums would not stay in registers.
  FUSEDOPT_DEVICE void add(float weighed, int row) {
    const float square = weighed * weighed;
    switch (row % kWeighedRows) {
      case 0:
        first = square;
        break;
      case 1:
        first = first + square;
        break;
      case 2:
        second = square;
        break;
      default:
        sum = sum + static_cast<double>(first + (second + square));
        first = second = 0.0f;
    }
  }
  // The last rows of a slab, of which there may be fewer than four.
  FUSEDOPT_DEVICE void finish() { sum = sum + static_cast<double>(first + second); }
};

// Adds `count` rows of a column to its sums. The first is element `begin`; weight(row) gives the weight of a row.
template <class Weight>
FUSEDOPT_DEVICE void add_to_column(const NormalizedMatrix& m, int64_t begin, int count, float multiplier,
                                   const Weight& weight, double& sum, WeighedColumn& weighted) {
  with_numbers(m.grad, m.formats.grad(), [&](const auto& grad) {
    constexpr int kLoads = 8;
    static_assert(kLoads % kWeighedRows == 0);
    for_each_loaded<kLoads>(
        0, count, 1, [&](int row) { return grad(begin + row * m.cut.column_count); },
        [&](float g, int row, int k) {
          sum = with_square(sum, g * multiplier);
          weighted.add((g * multiplier) * weight(row), k);
        });
  });
}

FUSEDOPT_DEVICE void store_column(const NormalizedMatrix& m, int64_t slab, int64_t column, double sum,
                                  WeighedColumn& weighted) {
  m.column_sums[slab * m.cut.column_count + column] = sum;
  if (m.weighted_sums == nullptr) return;
  weighted.finish();
  m.weighted_sums[slab * m.cut.column_count + column] = weighted.sum;
}

struct RowRange {
  int64_t begin;  // counted through all matrices
  int count;
};

FUSEDOPT_DEVICE RowRange rows_of_slab(const NormalizedMatrix& m, int64_t slab) {
  const SlabRows rows = m.cut.rows_of(slab);
  return {rows.matrix_row + rows.begin, static_cast<int>(rows.count)};
}

// ---- matrices: sums of rows and columns ----------------------------------------------------------

__global__ void __launch_bounds__(kSumThreads) row_sum_kernel(const __grid_constant__ MatrixParams params) {
  const NormalizedMatrix& m = tensor_of_block(params);
  const Normalization& known = params.normalizations[m.index];
  if (known.skips) return;
  const RowChunk chunk = row_chunk(m);
  const double sum = chunk_sum_of_grads<8>(m, chunk.begin, chunk.length, known.multiplier);
  if (sum_lane() != 0 || chunk.length == 0) return;
  m.row_sums[chunk.place(m)] = m.cut.panels > 1 ? sum : move_row(m, chunk.row, sum, known.moments);
}

// Rows of more than one panel.
__global__ void __launch_bounds__(kSumThreads) row_average_kernel(const __grid_constant__ MatrixParams params) {
  const NormalizedMatrix& m = tensor_of_block(params);
  const Normalization& known = params.normalizations[m.index];
  const int64_t row = thread_of(m);
  if (known.skips || row >= m.cut.rows()) return;
  double* sums = m.row_sums + row * m.cut.panels;
  sums[0] = move_row(m, row, pairwise_sum(sums, m.cut.panels), known.moments);
}

__global__ void __launch_bounds__(kSumThreads) column_sum_kernel(const __grid_constant__ MatrixParams params) {
  const NormalizedMatrix& m = tensor_of_block(params);
  const Normalization& known = params.normalizations[m.index];
  const int64_t slab = thread_of(m) / m.cut.column_count, column = thread_of(m) - slab * m.cut.column_count;
  if (known.skips || slab >= m.cut.all_slabs()) return;
  const RowRange rows = rows_of_slab(m, slab);
  const double* weights = m.row_sums + rows.begin * m.cut.panels;
  double sum = 0.0;
  WeighedColumn weighted;
  add_to_column(
      m, rows.begin * m.cut.column_count + column, rows.count, known.multiplier,
      [&](int row) { return static_cast<float>(weights[row * m.cut.panels]); }, sum, weighted);
  store_column(m, slab, column, sum, weighted);
}

// Asks for bytes to come to the second-level cache, from all threads of a block.
FUSEDOPT_DEVICE void prefetch([[maybe_unused]] const void* data, int64_t begin, int64_t end) {
  constexpr int kLine = 128;
  for (int64_t i = begin + threadIdx.x * kLine; i < end; i += blockDim.x * kLine) {
#if defined(__CUDA_ARCH__)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(data) + i));
#endif
  }
}

// Sums of rows and of columns for a slab of at most kMaxSlabColumns columns, by one block.
__global__ void __launch_bounds__(kSlabThreads, 2) slab_kernel(const __grid_constant__ MatrixParams params) {
  __shared__ double weights[kSlabRows];
  const NormalizedMatrix& m = tensor_of_block(params);
  const Normalization& known = params.normalizations[m.index];
  if (known.skips) return;
  const float multiplier = known.multiplier;
  const int64_t slab = blockIdx.x - m.first_block;
  const RowRange rows = rows_of_slab(m, slab);
  const int columns = static_cast<int>(m.cut.column_count), thread = static_cast<int>(threadIdx.x);
  const int own = thread / kSumLanes;  // row, of those that are summed at a time
  double sums[kSlabColumns] = {};
  WeighedColumn weighted[kSlabColumns];
  for (int done = 0; done < rows.count; done += kSlabRows) {
    const int64_t first = rows.begin + done;
    const int count = rows.count - done < kSlabRows ? rows.count - done : kSlabRows;
    const int64_t begin = (first + own) * columns;
    // The next rows, while these are worked on.
    const int64_t row_bytes = columns * size_of(m.formats.grad());
    const int64_t end = rows.begin + (done + 2 * kSlabRows < rows.count ? done + 2 * kSlabRows : rows.count);
    prefetch(m.grad, (first + kSlabRows) * row_bytes, end * row_bytes);
    const int length = own < count ? columns : 0;
    const double sum = chunk_sum_of_grads<16>(m, begin, length, multiplier);
    if (sum_lane() == 0) weights[own] = sum;
    __syncthreads();
    // Side by side in one warp, because these are divisions in double.
    if (thread < count) weights[thread] = move_row(m, first + thread, weights[thread], known.moments);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kSlabColumns; ++k) {
      const int column = thread + k * kSlabThreads;
      if (column >= columns) continue;
      add_to_column(
          m, first * columns + column, count, multiplier, [&](int row) { return static_cast<float>(weights[row]); },
          sums[k], weighted[k]);
    }
    __syncthreads();
  }
#pragma unroll
  for (int k = 0; k < kSlabColumns; ++k) {
    const int column = thread + k * kSlabThreads;
    if (column < columns) store_column(m, slab, column, sums[k], weighted[k]);
  }
}

// ---- matrices: averages and factors --------------------------------------------------------------

// Fewer than eight numbers are filled up with zeros, which change no sum of squares.
template <class Get>
FUSEDOPT_DEVICE double sum_of_eight(int64_t count, const Get& get) {
  double x[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = i < count ? get(i) : 0.0;
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

// The sum in pairs of the sums of slabs, which lie `stride` apart.
FUSEDOPT_DEVICE double sum_of_slabs(const double* sums, int64_t slabs, int64_t stride) {
  static_assert(kMaxSlabs == 8 * 8);
  return sum_of_eight(divided_up(slabs, 8), [&](int k) {
    return sum_of_eight(slabs - k * 8, [&](int i) { return sums[(k * 8 + i) * stride]; });
  });
}

__global__ void __launch_bounds__(kSumThreads) column_average_kernel(const __grid_constant__ MatrixParams params) {
  const NormalizedMatrix& m = tensor_of_block(params);
  const Normalization& known = params.normalizations[m.index];
  const int64_t i = thread_of(m), matrix = i / m.cut.column_count;
  if (known.skips || matrix >= m.cut.matrices) return;
  const int64_t sums = matrix * m.cut.slabs * m.cut.column_count + (i - matrix * m.cut.column_count);
  const double sum = sum_of_slabs(m.column_sums + sums, m.cut.slabs, m.cut.column_count);
  const float average = moved_average(m.columns[i], sum, m.cut.row_count, known.moments);
  m.columns[i] = average;
  m.column_factors[i] = column_factor(average, known.moments);
  if (m.weighted_sums == nullptr) return;
  const double weighted = sum_of_slabs(m.weighted_sums + sums, m.cut.slabs, m.cut.column_count);
  m.weighted_sums[sums] = weighted / static_cast<double>(average);
}

// One block per matrix: the mean of the averages of its rows and, from weighted sums, the sum of its squared updates.
__global__ void __launch_bounds__(kSumThreads) mean_kernel(const __grid_constant__ MatrixParams params) {
  __shared__ double held[kPairs];
  const NormalizedMatrix& m = tensor_of_block(params);
  if (params.normalizations[m.index].skips) return;
  const int64_t matrix = blockIdx.x - m.first_block, chunks = chunks_of(m.cut.row_count);
  const float* averages = m.rows + matrix * m.cut.row_count;
  double* sums = m.chunk_sums + matrix * chunks;
  for (int64_t first = 0; first < chunks; first += kBlockChunks) {
    const int64_t chunk = first + threadIdx.x / kSumLanes, begin = chunk * kReductionChunk;
    const int length = length_of_chunk(begin, m.cut.row_count);
    double sum = 0.0;
    for_each_loaded<8>(
        sum_lane(), length, kSumLanes, [&](int i) { return averages[begin + i]; },
        [&](float average, int, int) { sum = sum + static_cast<double>(average); });
    sum = total_of_lanes(sum);
    if (sum_lane() == 0 && length > 0) sums[chunk] = sum;
  }
  __syncthreads();
  const double total = pairwise_sum_of_block(sums, chunks, held);
  const float mean = static_cast<float>(total / static_cast<double>(m.cut.row_count));
  if (threadIdx.x == 0) m.means[matrix] = mean;
  if (m.weighted_sums == nullptr) return;
  double* weighted = m.weighted_sums + matrix * m.cut.slabs * m.cut.column_count;
  const double updates = pairwise_sum_of_block(weighted, m.cut.column_count, held) * static_cast<double>(mean);
  if (threadIdx.x == 0) m.update_sums[matrix] = updates;
}

__global__ void __launch_bounds__(kSumThreads) row_factor_kernel(const __grid_constant__ MatrixParams params) {
  const NormalizedMatrix& m = tensor_of_block(params);
  const Normalization& known = params.normalizations[m.index];
  const int64_t row = thread_of(m);
  if (known.skips || row >= m.cut.rows()) return;
  m.row_factors[row] = row_factor(m.rows[row], m.means[row / m.cut.row_count], known.moments);
}

// ---- matrices: sums of units -----------------------------------------------------------------------

__global__ void __launch_bounds__(kSumThreads, kSumBlocks)
    weight_sum_kernel(const __grid_constant__ MatrixParams params) {
  const NormalizedMatrix& m = tensor_of_block(params);
  if (params.normalizations[m.index].skips) return;
  const RowChunk chunk = row_chunk(m);
  const double sum = chunk_sum_of_weights<8>(m, chunk.begin, chunk.length);
  if (sum_lane() == 0 && chunk.length > 0) m.weight_sums[chunk.place(m)] = sum;
}

// Where moments are clamped: sums of squared updates by row and panel.
__global__ void __launch_bounds__(kSumThreads, kSumBlocks)
    update_sum_kernel(const __grid_constant__ MatrixParams params) {
  const NormalizedMatrix& m = tensor_of_block(params);
  const Normalization& known = params.normalizations[m.index];
  if (known.skips) return;
  const Moments moments = known.moments;
  const float multiplier = known.multiplier;
  const RowChunk chunk = row_chunk(m);
  const float row = chunk.length > 0 ? m.row_factors[chunk.row] : 0.0f;
  const float* columns =
      m.column_factors + chunk.row / m.cut.row_count * m.cut.column_count + chunk.panel * kReductionChunk;
  const double sum = chunk_sum_of_grads<8>(
      m, chunk.length, [=](const auto& grad, int i) { return GradAnd{grad(chunk.begin + i), columns[i]}; },
      [=](const GradAnd& x, int) { return normalize<true>(x.grad * multiplier, row, x.other, moments); });
  if (sum_lane() == 0 && chunk.length > 0) m.row_sums[chunk.place(m)] = sum;
}

// Adds numbers in order, by a warp; every lane gets the sum.
FUSEDOPT_DEVICE double ordered_sum(const double* numbers, int64_t count, int64_t stride) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  double sum = 0.0;
  for (int64_t begin = 0; begin < count; begin += 32) {
    // Zeros change no sum of squares.
    const double number = begin + lane < count ? numbers[(begin + lane) * stride] : 0.0;
#pragma unroll
    for (int i = 0; i < 32; ++i) sum = sum + __shfl_sync(0xFFFFFFFFu, number, i);
  }
  return sum;
}

// One warp per unit: the rows of a slab in order.
__global__ void __launch_bounds__(kSumThreads) unit_sum_kernel(const __grid_constant__ MatrixParams params) {
  const NormalizedMatrix& m = tensor_of_block(params);
  const int64_t unit = thread_of(m) / 32;
  if (params.normalizations[m.index].skips || unit >= m.cut.units()) return;
  const int64_t slab = unit / m.cut.panels, panels = m.cut.panels;
  const RowRange rows = rows_of_slab(m, slab);
  const int64_t first = rows.begin * panels + (unit - slab * panels);
  const bool is_first = threadIdx.x % 32 == 0;
  if (m.weight_sums != nullptr) {
    const double sum = ordered_sum(m.weight_sums + first, rows.count, panels);
    if (is_first) m.param_sums[unit] = sum;
  }
  if (m.weighted_sums == nullptr) {
    const double sum = ordered_sum(m.row_sums + first, rows.count, panels);
    if (is_first) m.update_sums[unit] = sum;
  }
}

// ---- the end of both ----------------------------------------------------------------------------

// One block per tensor.
__global__ void __launch_bounds__(kSumThreads) part_kernel(const __grid_constant__ PartParams params) {
  __shared__ double held[kPairs];
  const SummedParts& parts = tensor_of_block(params);
  Normalization& found = params.normalizations[parts.index];
  if (found.skips) return;
  const double updates = pairwise_sum_of_block(parts.update_sums, parts.update_count, held);
  if (threadIdx.x == 0) found.update = updates;
  if (parts.param_sums == nullptr) return;
  const double weights = pairwise_sum_of_block(parts.param_sums, parts.param_count, held);
  if (threadIdx.x == 0) found.param = weights;
}

}  // namespace
}  // namespace fusedopt::cuda

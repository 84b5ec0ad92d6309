// What normalize.cuh gets by value: tensors of rules that normalize, and where to store what is found out about them.
#pragma once

#include "core/matrices.h"
#include "cuda/descriptors.h"

namespace fusedopt::cuda {

// Where the weights of a tensor are and in which formats, and its gradient.
struct NormalizedBuffers {
  const void *param, *master, *grad;
  int32_t index;  // in the list, of its Normalization
  Formats formats;
};

struct NormalizedMatrix : NormalizedBuffers {
  float *rows, *columns;                        // averages
  float *row_factors, *column_factors, *means;  // a mean of row averages for each matrix
  // One for each row and panel: first of squared gradients, after which a row's first holds the weight of the row; then
  // of squared updates. If slabs are taken whole, only these.
  double* row_sums;
  double* weight_sums;    // the same of squared weights; or null
  double* column_sums;    // of slabs: of squared gradients
  double* weighted_sums;  // the same divided by the averages of rows; null where moments are clamped
  double* chunk_sums;     // of averages of rows
  double* param_sums;     // of units; or null
  double* update_sums;    // of units; if there are weighted sums, of matrices
  MatrixCut cut;
  uint32_t first_block;
};

struct NormalizedVector : NormalizedBuffers {
  void* second;           // in float32, to be brought up to date; or, where the step does that, in any format
  const uint8_t* scales;  // of codes
  int64_t row;            // that their blocks do not cross
  DType second_dtype;
  bool takes_quotient;               // rules/normalize.h
  double *param_sums, *update_sums;  // of chunks; the first may be null
  int64_t numel;
  uint32_t first_block;
};

// Sums of the parts of a tensor.
struct SummedParts {
  double *param_sums, *update_sums;  // the first may be null
  int64_t param_count, update_count;
  int32_t index;
  uint32_t first_block;
};

template <class Tensor>
struct NormalizeParams {
  static constexpr int kCapacity = (kParameterBytes - 64) / static_cast<int>(sizeof(Tensor));
  Normalization* normalizations;
  int32_t count;
  Tensor tensors[kCapacity];
};
using MatrixParams = NormalizeParams<NormalizedMatrix>;
using VectorParams = NormalizeParams<NormalizedVector>;
using PartParams = NormalizeParams<SummedParts>;

}  // namespace fusedopt::cuda

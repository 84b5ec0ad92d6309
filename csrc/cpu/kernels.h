// What one instruction set offers: a table of functions, filled by its isa_*.cpp.
#pragma once

#include <cstdint>

#include "core/pairwise.h"
#include "core/tensors.h"
#include "rules/normalize.h"
#include "storage/blockwise8.h"
#include "storage/random.h"

namespace fusedopt {

// What is the same for every element of one tensor in one step.
struct StepContext {
  const void* hyper;      // the rule's Hyper
  float grad_multiplier;  // +- inverse loss scale x clip coefficient
  uint32_t stream_keys[kStreams];
};

// Sums of squares of an update, new weights less old in float, and of the new weights.
struct UpdateSums {
  double update, weight;
};

// Where the sums of the blocks of a tensor go, one number for each block (core/tensors.h: block_row).
struct UpdateTarget {
  float *updates, *weights;
};

// What a step records of a run of elements; null where it does not.
struct StepRecord {
  HealthCounts* health = nullptr;
  const UpdateTarget* updates = nullptr;
};

// Chunks begin and end where blocks do.
using StepFn = void (*)(const TensorDesc&, const StepContext&, int64_t begin, int64_t length, const StepRecord&);
using SquareSumFn = double (*)(const Buffer&, int64_t begin, int64_t length);

constexpr int kMaxRules = 32;
constexpr int kMaxPanels =
    4;  // of a unit, so that two groups of rows and the sums of columns fit in second-level caches

// The part of a slab of rows within a panel of at most kReductionChunk columns; or whole rows, if panels are few.
struct MatrixUnit {
  int64_t matrix_row;  // the first of its matrix, counted through all of them
  int64_t row_begin, row_end;
  int64_t column_begin, column_end;
  bool has_whole_rows;
};

// What the first pass over a unit adds up.
struct UnitSums {
  double* columns;   // of squared gradients
  double* weighted;  // of squared gradients divided by the average of their row; or null
  double* weights;   // of squared weights, one for each panel, to which they are added; or null
  double* rows;      // of squared gradients, row_stride apart, if rows are not whole
  int64_t row_stride;
};

struct Kernels {
  StepFn step[kMaxRules];  // in the order of rules/all.h
  SquareSumFn square_sum;  // of at most kReductionChunk elements
  // Of rules that normalize; see normalize.inl.
  void (*sum_unit)(const TensorDesc&, const Moments&, float multiplier, const MatrixUnit&, const UnitSums&);
  void (*sum_weighted)(const TensorDesc&, float multiplier, const MatrixUnit&, double* weighted);
  double (*sum)(const float* x, int64_t n);
  double (*sum_matrix_updates)(const TensorDesc&, const Moments&, float multiplier, const MatrixUnit&);
  double (*sum_vector_updates)(const TensorDesc&, const Moments&, float multiplier, int state, int64_t begin,
                               int64_t length, double* weights);
  double (*sum_quotients)(const TensorDesc&, const Moments&, float multiplier, int state, int64_t begin,
                          int64_t length);
};

#if defined(__x86_64__)
extern const Kernels kBaselineKernels, kV3Kernels, kV4Kernels;
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
#else
extern const Kernels kBaselineKernels;
#endif

}  // namespace fusedopt

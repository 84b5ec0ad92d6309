// What crosses the boundary into the core: pointers, 64-bit sizes, dtypes. No Torch.
#pragma once

#include <cstdint>

#include "core/portable.h"

namespace fusedopt {

constexpr int kMaxStates = 4;

// The values are positions in the list of names that follows, which Python reads (bindings.cpp). So are those below.
enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kUInt8, kInt8, kInt16 };
constexpr const char* kDTypeNames[] = {"float32", "bfloat16", "float16", "uint8", "int8", "int16"};  // torch's

constexpr int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
    case DType::kInt16:
      return 2;
    case DType::kUInt8:
    case DType::kInt8:
      return 1;
  }
  return 0;
}

// The distance from 1 to the next number of a floating-point format.
constexpr double epsilon_of(DType dtype) {
  return dtype == DType::kBFloat16 ? 0x1p-7 : dtype == DType::kFloat16 ? 0x1p-10 : 0x1p-23;
}

enum class Rounding : int32_t { kNearest, kStochastic };
constexpr const char* kRoundingNames[] = {"nearest", "stochastic"};

// What a 16-bit parameter keeps beside itself so that small updates are not lost (storage/master.h).
enum class Master : int32_t { kNone, kKahan, kSplit24, kSplit32, kFloat32 };
constexpr const char* kMasterNames[] = {nullptr, "kahan", "split24", "split32", "float32"};

// A flat run of numbers in memory and how it is encoded. kUInt8 are the codes of storage/blockwise8.h.
struct Buffer {
  void* data = nullptr;
  uint8_t* scales = nullptr;  // of codes: one for each block
  DType dtype = DType::kFloat32;
  Rounding rounding = Rounding::kNearest;
  bool is_signed = true;  // codes of numbers of both signs

  bool is_blockwise() const { return dtype == DType::kUInt8; }
};

// The factored second moment of a tensor that is one matrix or several, one after the other.
struct Factors {
  float* rows = nullptr;  // averages over each row, updated by a step
  float* columns = nullptr;
  int64_t row_count = 0;  // of one matrix
  int64_t column_count = 0;

  bool exist() const { return rows != nullptr; }
};

// What a step finds out about such a tensor before it takes the step.
struct NormalizeScratch {
  const float* row_factors = nullptr;
  const float* column_factors = nullptr;
  int64_t row_total = 0;  // of all matrices
};

// What a step counts of a tensor when it is asked to.
struct HealthCounts {
  int64_t stalled = 0;           // elements with a gradient other than 0 whose stored weight stayed as it was
  int64_t nonfinite_grads = 0;   // elements of the gradient that are inf or NaN
  int64_t codes = 0;             // 8-bit codes written
  int64_t saturated_codes = 0;   // of them, at the end of their range
  int64_t nonfinite_blocks = 0;  // blocks of codes that hold inf or NaN
  int64_t skipped = 0;           // elements that were left as they were (skips_blocks)
};

// All of them by name.
using HealthCountMember = int64_t HealthCounts::*;
struct HealthCount {
  const char* name;
  HealthCountMember count;
};
constexpr HealthCount kHealthCounts[] = {
    {"stalled", &HealthCounts::stalled},
    {"nonfinite_grads", &HealthCounts::nonfinite_grads},
    {"codes", &HealthCounts::codes},
    {"saturated_codes", &HealthCounts::saturated_codes},
    {"nonfinite_blocks", &HealthCounts::nonfinite_blocks},
    {"skipped", &HealthCounts::skipped},
};
static_assert(sizeof(kHealthCounts) / sizeof(HealthCount) == sizeof(HealthCounts) / sizeof(int64_t));

// One parameter of a step.
struct TensorDesc {
  Buffer param;
  Buffer grad;  // only read
  Buffer states[kMaxStates];
  Buffer master;  // as `master_format` says
  Master master_format = Master::kNone;
  Factors factors;
  const NormalizeScratch* scratch = nullptr;  // set within a step
  float* step = nullptr;                      // steps taken so far, on the host; the step increments it
  int64_t numel = 0;                          // elements held here
  int64_t row = 0;                            // blocks of codes do not cross multiples of this many elements
  int64_t first_index = 0;                    // index of the first of them in the global tensor, for random bits
  // A shard of columns is a segment of each row: elements that follow each other in the global tensor, too.
  int64_t segment = 0;         // how many that are; 0 if all do
  int64_t segment_stride = 0;  // from where one begins in the global tensor to where the next does
  int32_t group = 0;           // which GroupDesc steps it
  bool skips_blocks = false;   // leaves as it was what a step would make inf, NaN or too large for a block
  int64_t position = 0;        // within its group: reductions go in list order
};

// How many elements a row of a tensor has. Sums of weights and updates are taken over blocks of 64 elements of a row
// (fusedopt/reference/norm.py).
inline int64_t block_row(const TensorDesc& tensor) {
  if (tensor.segment != 0) return tensor.segment;
  for (const Buffer& state : tensor.states) {
    if (state.is_blockwise()) return tensor.row;
  }
  return tensor.numel;
}

// How many blocks of so many weights a tensor has.
inline int64_t blocks_of(const TensorDesc& tensor, int64_t length) {
  if (tensor.numel == 0) return 0;
  const int64_t row = block_row(tensor);
  return tensor.numel / row * divided_up(row, length);
}

}  // namespace fusedopt

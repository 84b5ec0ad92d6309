// What crosses the boundary into the core: pointers, 64-bit sizes, dtypes. No Torch.
#pragma once

#include <cstdint>

namespace fusedopt {

constexpr int kMaxStates = 4;

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

enum class Rounding : int32_t { kNearest = 0, kStochastic = 1 };

// A flat run of numbers in memory and how it is encoded.
struct Buffer {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  Rounding rounding = Rounding::kNearest;
};

// One parameter of a step.
struct TensorDesc {
  Buffer param;
  Buffer grad;  // only read
  Buffer states[kMaxStates];
  float* step = nullptr;    // steps taken so far, on the host; the step increments it
  int64_t numel = 0;        // elements held here
  int64_t first_index = 0;  // index of the first of them in the global tensor, for random bits
  int32_t group = 0;        // which GroupDesc steps it
  int64_t position = 0;     // within its group: reductions go in list order
};

}  // namespace fusedopt

// How matrices are cut up for their sums, on all backends (docs/numerics.md, Means): into slabs of rows, and slabs into
// panels of kReductionChunk columns.
#pragma once

#include <algorithm>

#include "core/pairwise.h"
#include "core/tensors.h"

namespace fusedopt {

constexpr int64_t kMaxSlabs = 64;
constexpr int64_t kMinSlabRows = 320;
constexpr int kWeighedRows = 4;  // rows whose weighted squares are first added to each other in float32

struct MatrixCut {
  int64_t matrices = 0;
  int64_t height = 1;  // rows of a slab; the last may be shorter
  int64_t slabs = 0;   // of a matrix
  int64_t panels = 0;  // of a slab

  FUSEDOPT_FN int64_t units() const { return matrices * slabs * panels; }  // parts of slabs within panels

  static MatrixCut of(const Factors& factors, int64_t numel) {
    MatrixCut cut;
    cut.matrices = numel / (factors.row_count * factors.column_count);
    cut.height = divided_up(factors.row_count, std::clamp<int64_t>(factors.row_count / kMinSlabRows, 1, kMaxSlabs));
    cut.slabs = divided_up(factors.row_count, cut.height);
    cut.panels = divided_up(factors.column_count, kReductionChunk);
    return cut;
  }
};

}  // namespace fusedopt

// How the matrices of a tensor are cut up for their sums, on all backends (docs/numerics.md, Means): into slabs of
// rows, and slabs into panels of kReductionChunk columns. Slabs, rows and columns are counted through all matrices.
#pragma once

#include <algorithm>

#include "core/pairwise.h"
#include "core/tensors.h"

namespace fusedopt {

constexpr int64_t kMaxSlabs = 64;
constexpr int64_t kMinSlabRows = 320;
constexpr int kWeighedRows = 4;  // rows whose weighted squares are first added to each other in float32

// The rows of a slab.
struct SlabRows {
  int64_t matrix_row;  // the first of its matrix
  int64_t begin;       // counted from there
  int64_t count;
};

struct MatrixCut {
  int64_t row_count = 0, column_count = 0;  // of a matrix
  int64_t matrices = 0;
  int64_t height = 1;  // rows of a slab; the last may be shorter
  int64_t slabs = 0;   // of a matrix
  int64_t panels = 0;  // of a slab

  FUSEDOPT_FN int64_t rows() const { return matrices * row_count; }
  FUSEDOPT_FN int64_t columns() const { return matrices * column_count; }
  FUSEDOPT_FN int64_t all_slabs() const { return matrices * slabs; }
  FUSEDOPT_FN int64_t slab_columns() const { return all_slabs() * column_count; }  // columns of slabs
  FUSEDOPT_FN int64_t row_parts() const { return rows() * panels; }                // what rows have of panels
  FUSEDOPT_FN int64_t units() const { return all_slabs() * panels; }               // what slabs have of them

  FUSEDOPT_FN SlabRows rows_of(int64_t slab) const {
    const int64_t matrix = slab / slabs;
    const int64_t begin = (slab - matrix * slabs) * height, left = row_count - begin;
    return {matrix * row_count, begin, left < height ? left : height};
  }

  // Of the factors of a tensor; nothing if it has none, or no elements.
  static MatrixCut of(const Factors& factors, int64_t numel) {
    MatrixCut cut;
    if (!factors.exist() || numel == 0) return cut;
    cut.row_count = factors.row_count;
    cut.column_count = factors.column_count;
    cut.matrices = numel / (cut.row_count * cut.column_count);
    cut.height = divided_up(cut.row_count, std::clamp<int64_t>(cut.row_count / kMinSlabRows, 1, kMaxSlabs));
    cut.slabs = divided_up(cut.row_count, cut.height);
    cut.panels = chunks_of(cut.column_count);
    return cut;
  }
};

}  // namespace fusedopt

// One tensor of a step of a rule that normalizes (rules/normalize.h): what is found out about it, and the passes over
// its parts. Who takes which part, and when, is normalize.cpp's and shards.cpp's.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "core/matrices.h"
#include "core/pairwise.h"
#include "core/registry.h"
#include "core/tensors.h"
#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#include "cpu/normalize.h"
#include "cpu/updates.h"
#include "rules/normalize.h"
#include "storage/random.h"

namespace fusedopt::cpu {

constexpr int64_t kItem = int64_t{1} << 16;  // elements of a work item
constexpr int64_t kManySlabs = 16;           // enough for units of whole rows

// Adds rows of `width` numbers in pairs; the sums are left in the first.
inline void pairwise_sum_rows(double* x, int64_t n, int64_t width) {
  while (n > 1) {
    const int64_t half = n / 2;
    for (int64_t i = 0; i < half; ++i) {
      const double* first = x + 2 * i * width;
      for (int64_t j = 0; j < width; ++j) x[i * width + j] = first[j] + first[width + j];
    }
    if (n % 2 == 1 && half > 0) std::copy_n(x + (n - 1) * width, width, x + half * width);
    n = half + n % 2;
  }
}

// Hands out numbers in whole cache lines, so that threads do not wait for each other's lines, and no vector lies in
// two of them.
template <class Number>
class Numbers {
 public:
  // Where n of them will be, counted from data().
  size_t want(int64_t n) {
    constexpr int64_t kLine = 128 / sizeof(Number);  // two: neighbours are fetched in pairs
    const size_t begin = wanted_;
    wanted_ += static_cast<size_t>(divided_up(n, kLine) * kLine);
    return begin;
  }
  void forget() { wanted_ = 0; }
  void settle() {
    size_t space = (wanted_ * sizeof(Number)) + kAlignment;
    if (memory_.size() < space) memory_.resize(space);
    space = memory_.size();
    void* first = memory_.data();
    data_ = static_cast<Number*>(std::align(kAlignment, wanted_ * sizeof(Number), first, space));
  }
  Number* data() const { return data_; }

 private:
  static constexpr size_t kAlignment = 128;
  std::vector<unsigned char> memory_;
  Number* data_ = nullptr;
  size_t wanted_ = 0;
};

// Memory for what a wave finds out, kept from wave to wave and from step to step: fresh memory costs page faults.
struct Workspace {
  Numbers<double> doubles;
  Numbers<float> floats;
};

// Parts of a job that several threads take; moved only before it begins.
class Countdown {
 public:
  Countdown() = default;
  Countdown(Countdown&&) noexcept {}
  void begin(int64_t parts) { left_.store(parts, std::memory_order_relaxed); }
  // Whether the part just done was the last. Whoever gets true sees what the others have written.
  bool counts_last() { return left_.fetch_sub(1, std::memory_order_acq_rel) == 1; }

 private:
  std::atomic<int64_t> left_{0};
};
// One tensor and what is found out about it in a step.
class Member {
 public:
  Member(const TensorDesc& tensor, int32_t index, const GroupDesc& group, Workspace& workspace)
      : Member(tensor, Whole::of(tensor), index, group, workspace) {}

  Member(const TensorDesc& tensor, const Whole& whole, int32_t index, const GroupDesc& group, Workspace& workspace)
      : tensor_(tensor),
        whole_(whole),
        index_(index),
        group_(&group),
        info_(&rules()[group.rule]),
        workspace_(&workspace) {
    multiplier_ = static_cast<float>(group.grad_multiplier);
    step_ = static_cast<int64_t>(*tensor.step) + 1;
    sums_.numel = whole.numel;
    sums_.dtype = tensor.param.dtype;
    derive();
    reads_weights_ = info_->reads_weights(group.config);
    cut_ = cut_of(tensor, whole);
    parts_ = is_matrix() ? cut_.units() : chunks_of(tensor.numel);
    if (is_matrix()) {
      has_whole_rows_ =
          !whole.cuts_columns &&
          (cut_.panels == 1 || (takes_weighted() && cut_.panels <= kMaxPanels && cut_.all_slabs() >= kManySlabs));
      if (!has_whole_rows_) row_sums_ = workspace.doubles.want(cut_.row_parts());
      column_sums_ = workspace.doubles.want(cut_.slab_columns());
      if (takes_weighted()) weighted_sums_ = workspace.doubles.want(cut_.slab_columns());
      means_ = workspace.floats.want(cut_.matrices);
      row_factors_ = workspace.floats.want(cut_.rows());
      column_factors_ = workspace.floats.want(cut_.columns());
    }
    update_sums_ = workspace.doubles.want(parts_);
    if (reads_weights_) param_sums_ = workspace.doubles.want(parts_);
  }

  // To be called once members no longer move and the workspace is there.
  void settle() {
    if (is_matrix()) units_left_.begin(units());
    scratch_ = {floats(row_factors_), floats(column_factors_), cut_.rows()};
    tensor_.scratch = &scratch_;
    context_.hyper = hyper_;
    context_.grad_multiplier = multiplier_;
    fill_stream_keys(group_->seed, step_, context_.stream_keys);
  }

  bool is_matrix() const { return whole_.row_count > 0; }
  int64_t units() const { return has_whole_rows_ ? cut_.all_slabs() : parts_; }  // of a matrix
  int64_t items() const { return divided_up(tensor_.numel, kItem); }

  // First pass over a unit of a matrix that is all here. Whoever does the last unit updates the averages and factors of
  // the matrix.
  void sum_unit(const Kernels& kernels, int64_t i) {
    sum_squares(kernels, i);
    if (units_left_.counts_last()) factor(kernels);
  }

  // The same, without what comes after the last.
  void sum_squares(const Kernels& kernels, int64_t i) {
    const MatrixUnit unit = unit_at(i);
    UnitSums sums{};
    sums.columns = columns_of(column_sums_, unit);
    if (takes_weighted() && unit.has_whole_rows) sums.weighted = columns_of(weighted_sums_, unit);
    if (reads_weights_) sums.weights = doubles(param_sums_) + first_part(unit);
    if (!unit.has_whole_rows) {
      sums.rows =
          doubles(row_sums_) + (unit.matrix_row + unit.row_begin) * cut_.panels + unit.column_begin / kReductionChunk;
      sums.row_stride = cut_.panels;
    }
    kernels.sum_unit(tensor_, moments(), multiplier_, unit, sums);
  }

  // Both passes before the step at once, over an item of elements without a matrix: none needs a sum over all.
  void sum_elements(const Kernels& kernels, int64_t item) {
    const int64_t end = std::min((item + 1) * kItem, tensor_.numel);
    for (int64_t begin = item * kItem; begin < end; begin += kReductionChunk) {
      const int64_t chunk = begin / kReductionChunk, length = std::min(kReductionChunk, end - begin);
      double* weights = reads_weights_ ? doubles(param_sums_) + chunk : nullptr;
      const int second = info_->second_moment;
      doubles(update_sums_)[chunk] =
          info_->takes_quotient
              ? kernels.sum_vector_updates(tensor_, moments(), multiplier_, second, begin, length, weights)
              : kernels.sum_quotients(tensor_, moments(), multiplier_, second, begin, length);
    }
  }

  // Second pass over a unit of a matrix, unless the first could do its work.
  bool needs_second_pass() const { return !takes_weighted() || !has_whole_rows_; }
  void sum_updates(const Kernels& kernels, int64_t i) {
    const MatrixUnit unit = unit_at(i);
    if (takes_weighted()) {
      kernels.sum_weighted(tensor_, multiplier_, unit, columns_of(weighted_sums_, unit));
    } else {
      doubles(update_sums_)[i] = kernels.sum_matrix_updates(tensor_, moments(), multiplier_, unit);
    }
  }

  // Sums of a tensor from those of its parts; each is to be asked for once.
  double param_sum() { return pairwise_sum(doubles(param_sums_), parts_); }
  double update_sum() {
    if (parts_ == 0) return 0.0;
    const bool is_weighted = is_matrix() && takes_weighted();
    for (int64_t matrix = 0; is_weighted && !has_whole_rows_ && matrix < cut_.matrices; ++matrix) {
      finish_weighted(matrix);
    }
    return pairwise_sum(doubles(update_sums_), is_weighted ? cut_.matrices : parts_);
  }
  void finish_sums() { derive_from(reads_weights_ ? param_sum() : 0.0, update_sum()); }

  // The scalars of the step, once the sums over the whole are known.
  void derive_from(double param_sum, double update_sum) {
    sums_.param = param_sum;
    sums_.update = update_sum;
    derive();
  }

  // Third pass: the step of an item of elements.
  void step(const Kernels& kernels, int64_t item, const Recording& recording) const {
    const int64_t begin = cut_between_blocks(tensor_, item * kItem);
    const int64_t end =
        (item + 1) * kItem < tensor_.numel ? cut_between_blocks(tensor_, (item + 1) * kItem) : tensor_.numel;
    step_chunk(kernels, group_->rule, tensor_, index_, context_, begin, end - begin, recording);
  }

  // All passes at once over a tensor of one item, by one thread, from its cache.
  bool is_small() const { return tensor_.numel <= kItem; }
  void take_whole(const Kernels& kernels, const Recording& recording) {
    if (is_matrix()) {
      for (int64_t i = 0; i < units(); ++i) sum_unit(kernels, i);
      for (int64_t i = 0; needs_second_pass() && i < units(); ++i) sum_updates(kernels, i);
    } else {
      sum_elements(kernels, 0);
    }
    finish_sums();
    step(kernels, 0, recording);
  }

  // ---- between the passes, of matrices

  const MatrixCut& cut() const { return cut_; }
  bool has_whole_rows() const { return has_whole_rows_; }  // whose averages the first pass updates
  bool reads_weights() const { return reads_weights_; }

  // The sum of what is here of a row, and the new average from that of the whole row.
  double row_sum(int64_t r) { return pairwise_sum(doubles(row_sums_) + r * cut_.panels, cut_.panels); }
  void average_row(int64_t r, double sum) {
    float& average = tensor_.factors.rows[r];
    average = moved_average(average, sum, whole_.column_count, moments());
  }

  // The sums of what is here of the columns of a matrix, and the new averages from those of the whole columns.
  const double* column_sums(int64_t matrix) {
    double* sums = doubles(column_sums_) + matrix * cut_.slabs * cut_.column_count;
    pairwise_sum_rows(sums, cut_.slabs, cut_.column_count);
    return sums;
  }
  void average_columns(int64_t matrix, const double* sums) {
    float* columns = tensor_.factors.columns + matrix * cut_.column_count;
    float* column_factors = floats(column_factors_) + matrix * cut_.column_count;
    for (int64_t c = 0; c < cut_.column_count; ++c) {
      columns[c] = moved_average(columns[c], sums[c], whole_.row_count, moments());
      column_factors[c] = column_factor(columns[c], moments());
    }
  }

  // The sum of the averages of the rows here, and the factors of rows from that of all rows.
  double sum_of_averages(const Kernels& kernels, int64_t matrix) const {
    const float* averages = tensor_.factors.rows + matrix * cut_.row_count;
    std::vector<double> chunks;
    for (int64_t begin = 0; begin < cut_.row_count; begin += kReductionChunk) {
      chunks.push_back(kernels.sum(averages + begin, std::min(kReductionChunk, cut_.row_count - begin)));
    }
    return pairwise_sum(chunks.data(), static_cast<int64_t>(chunks.size()));
  }
  void factor_rows(int64_t matrix, double sum) {
    const float mean = floats(means_)[matrix] = static_cast<float>(sum / static_cast<double>(whole_.row_count));
    const float* averages = tensor_.factors.rows + matrix * cut_.row_count;
    float* row_factors = floats(row_factors_) + matrix * cut_.row_count;
    for (int64_t r = 0; r < cut_.row_count; ++r) row_factors[r] = row_factor(averages[r], mean, moments());
    if (takes_weighted() && has_whole_rows_) finish_weighted(matrix);
  }

 private:
  static MatrixCut cut_of(const TensorDesc& tensor, const Whole& whole) {
    MatrixCut cut = MatrixCut::of(tensor.factors, tensor.numel);
    if (tensor.numel == 0) {  // a shard without elements may have averages all the same
      cut.matrices = whole.matrices;
      cut.row_count = tensor.factors.row_count;
      cut.column_count = tensor.factors.column_count;
    }
    return cut;
  }

  void factor(const Kernels& kernels) {
    for (int64_t r = 0; !has_whole_rows_ && r < cut_.rows(); ++r) average_row(r, row_sum(r));
    for (int64_t matrix = 0; matrix < cut_.matrices; ++matrix) {
      average_columns(matrix, column_sums(matrix));
      factor_rows(matrix, sum_of_averages(kernels, matrix));
    }
  }

  double* doubles(size_t offset) const { return workspace_->doubles.data() + offset; }
  float* floats(size_t offset) const { return workspace_->floats.data() + offset; }
  void derive() { info_->derive(group_->config, step_, sums_, hyper_); }
  const Moments& moments() const { return info_->moments(hyper_); }

  bool takes_weighted() const { return !moments().is_clamped; }

  MatrixUnit unit_at(int64_t i) const {
    const int64_t panels = has_whole_rows_ ? 1 : cut_.panels;
    const int64_t width = has_whole_rows_ ? cut_.column_count : kReductionChunk, column = i % panels * width;
    const SlabRows rows = cut_.rows_of(i / panels);
    return {rows.matrix_row, rows.begin, rows.begin + rows.count, column, std::min(column + width, cut_.column_count),
            has_whole_rows_};
  }

  // Where sums of the columns of a unit lie.
  double* columns_of(size_t sums, const MatrixUnit& unit) const {
    return doubles(sums) + slab_of(unit) * cut_.column_count + unit.column_begin;
  }
  int64_t slab_of(const MatrixUnit& unit) const {
    return unit.matrix_row / cut_.row_count * cut_.slabs + unit.row_begin / cut_.height;
  }
  int64_t first_part(const MatrixUnit& unit) const {
    return slab_of(unit) * cut_.panels + unit.column_begin / kReductionChunk;
  }

  // The sum of the squares of a matrix's update, from the weighted sums of its columns.
  void finish_weighted(int64_t matrix) {
    const int64_t count = tensor_.factors.column_count;
    double* sums = doubles(weighted_sums_) + matrix * cut_.slabs * count;
    pairwise_sum_rows(sums, cut_.slabs, count);
    const float* averages = tensor_.factors.columns + matrix * count;
    for (int64_t c = 0; c < count; ++c) sums[c] = sums[c] / static_cast<double>(averages[c]);
    doubles(update_sums_)[matrix] = pairwise_sum(sums, count) * static_cast<double>(floats(means_)[matrix]);
  }

  TensorDesc tensor_;
  Whole whole_;
  int32_t index_;
  const GroupDesc* group_;
  const RuleInfo* info_;
  Workspace* workspace_;
  float multiplier_;
  bool reads_weights_;
  int64_t step_;
  TensorSums sums_;
  StepContext context_{};
  NormalizeScratch scratch_;
  MatrixCut cut_;
  int64_t parts_;
  bool has_whole_rows_ = false;  // whether units have whole rows, or else panels of them
  Countdown units_left_;
  size_t row_sums_ = 0, column_sums_ = 0, weighted_sums_ = 0, update_sums_ = 0, param_sums_ = 0;  // in the workspace
  size_t means_ = 0, row_factors_ = 0, column_factors_ = 0;
  alignas(16) unsigned char hyper_[kMaxHyperBytes];
};
// Work items of several members, in order.
class Items {
 public:
  void add(Member& member, int64_t count) {
    if (count == 0) return;
    members_.push_back(&member);
    ends_.push_back(size() + count);
  }
  int64_t size() const { return ends_.empty() ? 0 : ends_.back(); }
  // The member of item i, and which of its items that is.
  std::pair<Member*, int64_t> at(int64_t i) const {
    const size_t k = static_cast<size_t>(std::upper_bound(ends_.begin(), ends_.end(), i) - ends_.begin());
    return {members_[k], i - (k == 0 ? 0 : ends_[k - 1])};
  }

 private:
  std::vector<Member*> members_;
  std::vector<int64_t> ends_;
};
}  // namespace fusedopt::cpu

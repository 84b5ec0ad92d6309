#include "cpu/normalize.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <utility>

#include "core/matrices.h"
#include "core/pairwise.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "rules/normalize.h"
#include "storage/random.h"

namespace fusedopt::cpu {
namespace {

// Tensors are taken in waves of about this many elements, so that each pass finds in cache what the last one read.
constexpr int64_t kWave = 1 << 20;
constexpr int64_t kItem = UpdateRecord::kCut;  // elements of a work item
constexpr size_t kMembers = 512;               // of a wave, to begin with
constexpr int64_t kLateSteps = 4;              // that a thread keeps for the end: about a unit's time
constexpr int64_t kManySlabs = 16;             // enough for units of whole rows

// Adds rows of `width` numbers in pairs; the sums are left in the first.
void pairwise_sum_rows(double* x, int64_t n, int64_t width) {
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
      : tensor_(tensor), index_(index), group_(&group), info_(&rules()[group.rule]), workspace_(&workspace) {
    multiplier_ = static_cast<float>(group.grad_multiplier);
    step_ = static_cast<int64_t>(*tensor.step) + 1;
    sums_.numel = tensor.numel;
    sums_.dtype = tensor.param.dtype;
    derive();
    reads_weights_ = info_->reads_weights(group.config);
    cut_ = MatrixCut::of(tensor.factors, tensor.numel);
    parts_ = is_matrix() ? cut_.units() : chunks_of(tensor.numel);
    if (is_matrix()) {
      has_whole_rows_ =
          cut_.panels == 1 || (takes_weighted() && cut_.panels <= kMaxPanels && cut_.all_slabs() >= kManySlabs);
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

  bool is_matrix() const { return tensor_.factors.exist(); }
  int64_t units() const { return has_whole_rows_ ? cut_.all_slabs() : parts_; }  // of a matrix
  int64_t items() const { return divided_up(tensor_.numel, kItem); }

  // First pass over a unit of a matrix. Whoever does the last unit updates the averages and factors of the matrix.
  void sum_unit(const Kernels& kernels, int64_t i) {
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
    if (units_left_.counts_last()) factor(kernels);
  }

  // Both passes before the step at once, over an item of elements without a matrix: none needs a sum over all.
  void sum_elements(const Kernels& kernels, int64_t item) {
    const int64_t end = std::min((item + 1) * kItem, tensor_.numel);
    for (int64_t begin = item * kItem; begin < end; begin += kReductionChunk) {
      const int64_t chunk = begin / kReductionChunk, length = std::min(kReductionChunk, end - begin);
      double* weights = reads_weights_ ? doubles(param_sums_) + chunk : nullptr;
      doubles(update_sums_)[chunk] =
          kernels.sum_vector_updates(tensor_, moments(), multiplier_, info_->second_moment, begin, length, weights);
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

  // Sums of a tensor from those of its parts.
  void finish_sums() {
    if (is_matrix() && takes_weighted() && !has_whole_rows_) {
      for (int64_t matrix = 0; matrix < cut_.matrices; ++matrix) finish_weighted(matrix);
    }
    if (reads_weights_) sums_.param = pairwise_sum(doubles(param_sums_), parts_);
    sums_.update = pairwise_sum(doubles(update_sums_), is_matrix() && takes_weighted() ? cut_.matrices : parts_);
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

 private:
  // Between the passes.
  void factor(const Kernels& kernels) {
    const Factors& factors = tensor_.factors;
    for (int64_t r = 0; !has_whole_rows_ && r < cut_.rows(); ++r) {
      const double sum = pairwise_sum(doubles(row_sums_) + r * cut_.panels, cut_.panels);
      factors.rows[r] = moved_average(factors.rows[r], sum, factors.column_count, moments());
    }
    for (int64_t matrix = 0; matrix < cut_.matrices; ++matrix) {
      double* sums = doubles(column_sums_) + matrix * cut_.slabs * factors.column_count;
      pairwise_sum_rows(sums, cut_.slabs, factors.column_count);
      float* columns = factors.columns + matrix * factors.column_count;
      float* column_factors = floats(column_factors_) + matrix * factors.column_count;
      for (int64_t c = 0; c < factors.column_count; ++c) {
        columns[c] = moved_average(columns[c], sums[c], factors.row_count, moments());
        column_factors[c] = column_factor(columns[c], moments());
      }
      const float mean = floats(means_)[matrix] = mean_of_rows(kernels, matrix);
      const float* averages = factors.rows + matrix * factors.row_count;
      float* row_factors = floats(row_factors_) + matrix * factors.row_count;
      for (int64_t r = 0; r < factors.row_count; ++r) row_factors[r] = row_factor(averages[r], mean, moments());
      if (takes_weighted() && has_whole_rows_) finish_weighted(matrix);
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

  float mean_of_rows(const Kernels& kernels, int64_t matrix) const {
    const int64_t count = tensor_.factors.row_count;
    const float* averages = tensor_.factors.rows + matrix * count;
    std::vector<double> chunks;
    for (int64_t begin = 0; begin < count; begin += kReductionChunk) {
      chunks.push_back(kernels.sum(averages + begin, std::min(kReductionChunk, count - begin)));
    }
    const double total = pairwise_sum(chunks.data(), static_cast<int64_t>(chunks.size()));
    return static_cast<float>(total / static_cast<double>(count));
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

// Tensors that go through the passes together.
struct Wave {
  std::vector<Member> members;
  Items small, units, second, elements, steps;  // small ones are in no other

  void settle(Workspace& workspace) {
    workspace.doubles.settle();
    workspace.floats.settle();
    for (Member& member : members) {
      member.settle();
      if (member.is_small()) {
        small.add(member, 1);
        continue;
      }
      if (member.is_matrix()) {
        units.add(member, member.units());
        if (member.needs_second_pass()) second.add(member, member.units());
      } else {
        elements.add(member, member.items());
      }
      steps.add(member, member.items());
    }
  }
};

}  // namespace

void step_normalizing(const std::vector<TensorDesc>& tensors, const std::vector<int32_t>& listed,
                      const std::vector<GroupDesc>& groups, const Kernels& kernels, int threads,
                      const Recording& recording) {
  const IeeeMode ieee;  // scalars are derived here, too
  static thread_local Workspace workspaces[2];
  // The step of one wave runs together with the first pass of the next, so that threads wait less often for the last
  // one. Each goes back through what it has read, the last first, as that is still in its cache, and keeps some steps
  // for the end.
  const auto step_and_sum = [&](const Wave& last, const Wave& next) {
    const int64_t items = last.steps.size() + next.units.size() + next.elements.size() + next.small.size();
    const int team = team_for(items, threads);
    Shares steps(last.steps.size(), team, Shares::Order::kBackwards), late_steps = steps.keep_back(kLateSteps);
    Shares units(next.units.size(), team), elements(next.elements.size(), team), small(next.small.size(), team);
    const auto step = [&](int64_t i) {
      const auto [member, item] = last.steps.at(i);
      member->step(kernels, item, recording);
    };
    parallel_team(team, [&](int thread) {
      steps.take(thread, step);
      units.take(thread, [&](int64_t i) {
        const auto [member, unit] = next.units.at(i);
        member->sum_unit(kernels, unit);
      });
      elements.take(thread, [&](int64_t i) {
        const auto [member, item] = next.elements.at(i);
        member->sum_elements(kernels, item);
      });
      small.take(thread, [&](int64_t i) { next.small.at(i).first->take_whole(kernels, recording); });
      late_steps.take(thread, step);
    });
  };

  Wave last;
  size_t taken = 0;
  for (int turn = 0; taken < listed.size() || !last.members.empty(); turn = 1 - turn) {
    Workspace& workspace = workspaces[turn];
    workspace.doubles.forget();
    workspace.floats.forget();
    Wave wave;
    wave.members.reserve(std::min<size_t>(listed.size() - taken, kMembers));
    for (int64_t held = 0; taken < listed.size() && held < kWave; ++taken) {
      const TensorDesc& tensor = tensors[listed[taken]];
      if (tensor.numel == 0) continue;
      wave.members.emplace_back(tensor, listed[taken], groups[tensor.group], workspace);
      held += tensor.numel;
    }
    wave.settle(workspace);
    step_and_sum(last, wave);
    parallel_items(wave.second.size(), threads, [&](int64_t i) {
      const auto [member, unit] = wave.second.at(i);
      member->sum_updates(kernels, unit);
    });
    for (Member& member : wave.members) {
      if (!member.is_small()) member.finish_sums();
    }
    last = std::move(wave);
  }
}

}  // namespace fusedopt::cpu

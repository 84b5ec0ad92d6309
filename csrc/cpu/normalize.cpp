#include "cpu/normalize.h"

#include <algorithm>
#include <utility>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "rules/normalize.h"
#include "storage/random.h"

namespace fusedopt::cpu {
namespace {

// Tensors are taken in waves of about as many elements: what a pass has read, the next one finds in cache.
constexpr int64_t kWave = 1 << 20;
constexpr int64_t kItem = 1 << 16;  // elements of a work item
constexpr size_t kMembers = 512;    // of a wave, to begin with
constexpr int64_t kMaxSlabs = 32;
constexpr int64_t kMinSlabRows = 160;

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Adds numbers in pairs, an odd one out moving up; destroys them.
double pairwise_sum(double* x, int64_t n) {
  if (n == 0) return 0.0;
  while (n > 1) {
    const int64_t half = n / 2;
    for (int64_t i = 0; i < half; ++i) x[i] = x[2 * i] + x[2 * i + 1];
    if (n % 2 == 1) x[half] = x[n - 1];
    n = half + n % 2;
  }
  return x[0];
}

// The same of rows of `width` numbers; the sums are left in the first.
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

// Memory for what a wave finds out, kept from wave to wave and from step to step: fresh memory costs page faults.
struct Workspace {
  std::vector<double> doubles;
  std::vector<float> floats;
  size_t double_count = 0, float_count = 0;  // asked for so far

  size_t want_doubles(int64_t n) { return (double_count += static_cast<size_t>(n)) - static_cast<size_t>(n); }
  size_t want_floats(int64_t n) { return (float_count += static_cast<size_t>(n)) - static_cast<size_t>(n); }
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
    parts_ = divided_up(tensor.numel, kReductionChunk);
    const Factors& factors = tensor.factors;
    if (factors.exist()) {
      matrices_ = tensor.numel / (factors.row_count * factors.column_count);
      height_ = divided_up(factors.row_count, std::clamp<int64_t>(factors.row_count / kMinSlabRows, 1, kMaxSlabs));
      slabs_ = divided_up(factors.row_count, height_);
      panels_ = divided_up(factors.column_count, kReductionChunk);
      parts_ = matrices_ * slabs_ * panels_;
      if (panels_ > 1) row_sums_ = workspace.want_doubles(rows() * panels_);
      column_sums_ = workspace.want_doubles(matrices_ * slabs_ * factors.column_count);
      row_factors_ = workspace.want_floats(rows());
      column_factors_ = workspace.want_floats(matrices_ * factors.column_count);
    }
    update_sums_ = workspace.want_doubles(parts_);
    if (reads_weights_) param_sums_ = workspace.want_doubles(parts_);
  }

  // Only once members no longer move, and the workspace is there.
  void settle() {
    scratch_ = {floats(row_factors_), floats(column_factors_), rows()};
    tensor_.scratch = &scratch_;
    context_.hyper = hyper_;
    context_.grad_multiplier = multiplier_;
    for (uint32_t k = 0; k < 3; ++k) context_.stream_keys[k] = stream_key(group_->seed, step_, k);
  }

  bool is_matrix() const { return tensor_.factors.exist(); }
  int64_t units() const { return parts_; }  // of a matrix
  int64_t items() const { return divided_up(tensor_.numel, kItem); }

  // First pass, of a unit of a matrix: sums of gradients and weights.
  void sum_unit(const Kernels& kernels, int64_t i) {
    const MatrixUnit unit = unit_at(i);
    double* columns = doubles(column_sums_) + i / panels_ * tensor_.factors.column_count + unit.column_begin;
    double weights;
    if (panels_ > 1) {
      double* sums = doubles(row_sums_) + (unit.matrix_row + unit.row_begin) * panels_ + i % panels_;
      weights = kernels.sum_rows_and_columns(tensor_, multiplier_, unit, reads_weights_, sums, panels_, columns);
    } else {  // whole rows
      std::vector<double> sums(unit.row_end - unit.row_begin);
      weights = kernels.sum_rows_and_columns(tensor_, multiplier_, unit, reads_weights_, sums.data(), 1, columns);
      float* averages = tensor_.factors.rows + unit.matrix_row + unit.row_begin;
      for (size_t r = 0; r < sums.size(); ++r) {
        averages[r] = average_of(averages[r], sums[r], tensor_.factors.column_count);
      }
    }
    if (reads_weights_) doubles(param_sums_)[i] = weights;
  }

  // Both passes before the step at once, of an item of elements that are no matrix: nothing hangs on all of them.
  void sum_elements(const Kernels& kernels, int64_t item) {
    const int64_t end = std::min((item + 1) * kItem, tensor_.numel);
    for (int64_t begin = item * kItem; begin < end; begin += kReductionChunk) {
      const int64_t chunk = begin / kReductionChunk, length = std::min(kReductionChunk, end - begin);
      double* weights = reads_weights_ ? doubles(param_sums_) + chunk : nullptr;
      doubles(update_sums_)[chunk] =
          kernels.sum_vector_updates(tensor_, moments(), multiplier_, info_->second_moment, begin, length, weights);
    }
  }

  // Between the passes: the averages of a matrix and its factors.
  void factor(const Kernels& kernels) {
    const Factors& factors = tensor_.factors;
    for (int64_t r = 0; panels_ > 1 && r < rows(); ++r) {
      factors.rows[r] =
          average_of(factors.rows[r], pairwise_sum(doubles(row_sums_) + r * panels_, panels_), factors.column_count);
    }
    std::vector<double> chunks(divided_up(factors.row_count, kReductionChunk));
    for (int64_t matrix = 0; matrix < matrices_; ++matrix) {
      double* sums = doubles(column_sums_) + matrix * slabs_ * factors.column_count;
      pairwise_sum_rows(sums, slabs_, factors.column_count);
      float* columns = factors.columns + matrix * factors.column_count;
      float* column_factors = floats(column_factors_) + matrix * factors.column_count;
      for (int64_t c = 0; c < factors.column_count; ++c) {
        columns[c] = average_of(columns[c], sums[c], factors.row_count);
        column_factors[c] = column_factor(columns[c], moments());
      }
      const float* averages = factors.rows + matrix * factors.row_count;
      for (size_t i = 0; i < chunks.size(); ++i) {
        const int64_t begin = static_cast<int64_t>(i) * kReductionChunk;
        chunks[i] = kernels.sum(averages + begin, std::min(kReductionChunk, factors.row_count - begin));
      }
      const double total = pairwise_sum(chunks.data(), static_cast<int64_t>(chunks.size()));
      const float mean = static_cast<float>(total / static_cast<double>(factors.row_count));
      float* row_factors = floats(row_factors_) + matrix * factors.row_count;
      for (int64_t r = 0; r < factors.row_count; ++r) row_factors[r] = row_factor(averages[r], mean, moments());
    }
  }

  // Second pass, of a unit of a matrix.
  void sum_updates(const Kernels& kernels, int64_t i) {
    doubles(update_sums_)[i] = kernels.sum_matrix_updates(tensor_, moments(), multiplier_, unit_at(i));
  }

  void finish_sums() {
    if (reads_weights_) sums_.param = pairwise_sum(doubles(param_sums_), parts_);
    sums_.update = pairwise_sum(doubles(update_sums_), parts_);
    derive();
  }

  // Third pass: the step, of an item of elements.
  void step(const Kernels& kernels, int64_t item, HealthCounts* health) const {
    const int64_t begin = cut_between_blocks(tensor_, item * kItem);
    const int64_t end =
        (item + 1) * kItem < tensor_.numel ? cut_between_blocks(tensor_, (item + 1) * kItem) : tensor_.numel;
    const StepFn step_chunk = kernels.step[group_->rule];
    if (health == nullptr) return step_chunk(tensor_, context_, begin, end - begin, nullptr);
    HealthCounts counts;
    step_chunk(tensor_, context_, begin, end - begin, &counts);
    add_counts(health[index_], counts);
  }

  // All passes at once, of a tensor of one item: by one thread, from its cache.
  bool is_small() const { return tensor_.numel <= kItem; }
  void take_whole(const Kernels& kernels, HealthCounts* health) {
    if (is_matrix()) {
      for (int64_t i = 0; i < parts_; ++i) sum_unit(kernels, i);
      factor(kernels);
      for (int64_t i = 0; i < parts_; ++i) sum_updates(kernels, i);
    } else {
      sum_elements(kernels, 0);
    }
    finish_sums();
    step(kernels, 0, health);
  }

 private:
  int64_t rows() const { return matrices_ * tensor_.factors.row_count; }
  double* doubles(size_t offset) const { return workspace_->doubles.data() + offset; }
  float* floats(size_t offset) const { return workspace_->floats.data() + offset; }
  void derive() { info_->derive(group_->config, step_, sums_, hyper_); }
  const Moments& moments() const { return info_->moments(hyper_); }

  float average_of(float held, double square_sum, int64_t count) const {
    const Moments& m = moments();
    const double mean = square_sum / static_cast<double>(count);
    return average(held, static_cast<float>(m.is_clamped ? mean : mean + m.eps), m);
  }

  MatrixUnit unit_at(int64_t i) const {
    const Factors& factors = tensor_.factors;
    const int64_t panel = i % panels_, slab = i / panels_ % slabs_, matrix = i / panels_ / slabs_;
    return {matrix * factors.row_count, slab * height_, std::min((slab + 1) * height_, factors.row_count),
            panel * kReductionChunk, std::min((panel + 1) * kReductionChunk, factors.column_count)};
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
  int64_t matrices_ = 0, height_ = 1, slabs_ = 0, panels_ = 0, parts_;
  size_t row_sums_ = 0, column_sums_ = 0, update_sums_ = 0, param_sums_ = 0;  // places in the workspace
  size_t row_factors_ = 0, column_factors_ = 0;
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
  Items small, matrices, units, elements, steps;  // small ones are in no other

  void settle(Workspace& workspace) {
    if (workspace.doubles.size() < workspace.double_count) workspace.doubles.resize(workspace.double_count);
    if (workspace.floats.size() < workspace.float_count) workspace.floats.resize(workspace.float_count);
    for (Member& member : members) {
      member.settle();
      if (member.is_small()) {
        small.add(member, 1);
        continue;
      }
      if (member.is_matrix()) {
        matrices.add(member, 1);
        units.add(member, member.units());
      } else {
        elements.add(member, member.items());
      }
      steps.add(member, member.items());
    }
  }
};

}  // namespace

void step_normalizing(const std::vector<TensorDesc>& tensors, const std::vector<int32_t>& listed,
                      const std::vector<GroupDesc>& groups, const Kernels& kernels, int threads, HealthCounts* health) {
  const IeeeMode ieee;  // scalars are derived here, too
  static thread_local Workspace workspaces[2];
  // The step of one wave shares threads with the first pass of the next: fewer waits for the last to finish.
  const auto step_and_sum = [&](const Wave& last, const Wave& next) {
    const int64_t steps = last.steps.size(), units = next.units.size(), elements = next.elements.size();
    parallel_items(steps + units + elements + next.small.size(), threads, [&](int64_t i) {
      if (i < steps) {
        const auto [member, item] = last.steps.at(i);
        member->step(kernels, item, health);
      } else if (i < steps + units) {
        const auto [member, unit] = next.units.at(i - steps);
        member->sum_unit(kernels, unit);
      } else if (i < steps + units + elements) {
        const auto [member, item] = next.elements.at(i - steps - units);
        member->sum_elements(kernels, item);
      } else {
        next.small.at(i - steps - units - elements).first->take_whole(kernels, health);
      }
    });
  };

  Wave last;
  size_t taken = 0;
  for (int turn = 0; taken < listed.size() || !last.members.empty(); turn = 1 - turn) {
    Workspace& workspace = workspaces[turn];
    workspace.double_count = workspace.float_count = 0;
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
    parallel_items(wave.matrices.size(), threads, [&](int64_t i) { wave.matrices.at(i).first->factor(kernels); });
    parallel_items(wave.units.size(), threads, [&](int64_t i) {
      const auto [member, unit] = wave.units.at(i);
      member->sum_updates(kernels, unit);
    });
    for (Member& member : wave.members) {
      if (!member.is_small()) member.finish_sums();
    }
    last = std::move(wave);
  }
}

}  // namespace fusedopt::cpu

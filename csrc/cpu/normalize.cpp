#include "cpu/normalize.h"

#include <algorithm>
#include <memory>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "rules/normalize.h"
#include "storage/random.h"

namespace fusedopt::cpu {
namespace {

// Tensors are taken in waves of about as many elements: what a pass has read, the next one finds in cache.
constexpr int64_t kWave = 1 << 20;
constexpr int64_t kItem = 1 << 16;  // elements of a work item
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

// One tensor and what is found out about it in a step.
class Member {
 public:
  Member(const TensorDesc& tensor, int32_t index, const GroupDesc& group)
      : tensor_(tensor), index_(index), group_(group), info_(rules()[group.rule]) {
    multiplier_ = static_cast<float>(group.grad_multiplier);
    step_ = static_cast<int64_t>(*tensor.step) + 1;
    sums_.numel = tensor.numel;
    sums_.dtype = tensor.param.dtype;
    derive();
    if (info_.reads_weights(group.config)) param_sums_.resize(divided_up(tensor.numel, kReductionChunk));
    const Factors& factors = tensor.factors;
    if (!factors.exist()) {
      update_sums_.resize(divided_up(tensor.numel, kReductionChunk));
      return;
    }
    matrices_ = tensor.numel / (factors.row_count * factors.column_count);
    height_ = divided_up(factors.row_count, std::clamp<int64_t>(factors.row_count / kMinSlabRows, 1, kMaxSlabs));
    slabs_ = divided_up(factors.row_count, height_);
    panels_ = divided_up(factors.column_count, kReductionChunk);
    const int64_t rows = matrices_ * factors.row_count;
    if (panels_ > 1) row_sums_.resize(rows * panels_);
    column_sums_.resize(matrices_ * slabs_ * factors.column_count);
    update_sums_.resize(matrices_ * slabs_ * panels_);
    row_factors_.reset(new float[rows]);
    column_factors_.reset(new float[matrices_ * factors.column_count]);
    scratch_ = {row_factors_.get(), column_factors_.get(), rows};
  }
  Member(Member&&) = default;

  // Only once members no longer move.
  void settle() {
    tensor_.scratch = &scratch_;
    context_.hyper = hyper_;
    context_.grad_multiplier = multiplier_;
    for (uint32_t k = 0; k < 3; ++k) context_.stream_keys[k] = stream_key(group_.seed, step_, k);
  }

  int64_t numel() const { return tensor_.numel; }
  int32_t rule() const { return group_.rule; }
  bool is_matrix() const { return tensor_.factors.exist(); }
  bool reads_weights() const { return !param_sums_.empty(); }
  int64_t units() const { return matrices_ * slabs_ * panels_; }
  int64_t items() const { return divided_up(tensor_.numel, kItem); }

  // First pass, of unit i of a matrix.
  void sum_gradient(const Kernels& kernels, int64_t i) {
    const MatrixUnit unit = unit_at(i);
    const int64_t rows = unit.row_end - unit.row_begin, matrix = i / (slabs_ * panels_);
    double* columns =
        column_sums_.data() + i / panels_ * tensor_.factors.column_count + unit.column_begin;
    if (panels_ > 1) {
      double* sums = row_sums_.data() + (unit.matrix_row + unit.row_begin) * panels_ + i % panels_;
      kernels.sum_rows_and_columns(tensor_, multiplier_, unit, sums, panels_, columns);
      return;
    }
    std::vector<double> sums(rows);
    kernels.sum_rows_and_columns(tensor_, multiplier_, unit, sums.data(), 1, columns);
    float* averages = tensor_.factors.rows + matrix * tensor_.factors.row_count + unit.row_begin;
    for (int64_t r = 0; r < rows; ++r) averages[r] = average_of(averages[r], sums[r], tensor_.factors.column_count);
  }

  // Of the i-th item of elements.
  void sum_param(const Kernels& kernels, int64_t i) {
    for_each_chunk(i, [&](int64_t chunk, int64_t begin, int64_t length) {
      param_sums_[chunk] = kernels.sum_weights(tensor_, begin, length);
    });
  }

  // Between the passes: the averages of a matrix and its factors.
  void factor(const Kernels& kernels) {
    const Factors& factors = tensor_.factors;
    for (int64_t r = 0; panels_ > 1 && r < scratch_.row_total; ++r) {
      factors.rows[r] = average_of(factors.rows[r], pairwise_sum(row_sums_.data() + r * panels_, panels_),
                                   factors.column_count);
    }
    std::vector<double> chunks(divided_up(factors.row_count, kReductionChunk));
    for (int64_t matrix = 0; matrix < matrices_; ++matrix) {
      double* sums = column_sums_.data() + matrix * slabs_ * factors.column_count;
      pairwise_sum_rows(sums, slabs_, factors.column_count);
      float* columns = factors.columns + matrix * factors.column_count;
      for (int64_t c = 0; c < factors.column_count; ++c) {
        columns[c] = average_of(columns[c], sums[c], factors.row_count);
        column_factors_[matrix * factors.column_count + c] = column_factor(columns[c], moments());
      }
      const float* rows = factors.rows + matrix * factors.row_count;
      for (size_t i = 0; i < chunks.size(); ++i) {
        const int64_t begin = static_cast<int64_t>(i) * kReductionChunk;
        chunks[i] = kernels.sum(rows + begin, std::min(kReductionChunk, factors.row_count - begin));
      }
      const double total = pairwise_sum(chunks.data(), static_cast<int64_t>(chunks.size()));
      const float mean = static_cast<float>(total / static_cast<double>(factors.row_count));
      for (int64_t r = 0; r < factors.row_count; ++r) {
        row_factors_[matrix * factors.row_count + r] = row_factor(rows[r], mean, moments());
      }
    }
  }

  // Second pass, of unit i of a matrix or the i-th item of elements.
  void sum_update(const Kernels& kernels, int64_t i) {
    if (is_matrix()) {
      update_sums_[i] = kernels.sum_matrix_updates(tensor_, moments(), multiplier_, unit_at(i));
      return;
    }
    for_each_chunk(i, [&](int64_t chunk, int64_t begin, int64_t length) {
      update_sums_[chunk] =
          kernels.sum_vector_updates(tensor_, moments(), multiplier_, info_.second_moment, begin, length);
    });
  }

  void finish_sums() {
    sums_.param = pairwise_sum(param_sums_.data(), static_cast<int64_t>(param_sums_.size()));
    sums_.update = pairwise_sum(update_sums_.data(), static_cast<int64_t>(update_sums_.size()));
    derive();
  }

  // Third pass: the step.
  void step(const Kernels& kernels, int64_t begin, int64_t length, HealthCounts* health) const {
    const StepFn step_chunk = kernels.step[group_.rule];
    if (health == nullptr) return step_chunk(tensor_, context_, begin, length, nullptr);
    HealthCounts counts;
    step_chunk(tensor_, context_, begin, length, &counts);
    add_counts(health[index_], counts);
  }

  // Where the step may be cut near an element: between blocks.
  int64_t cut(int64_t position) const { return cut_between_blocks(tensor_, position); }

 private:
  void derive() { info_.derive(group_.config, step_, sums_, hyper_); }
  const Moments& moments() const { return info_.moments(hyper_); }

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

  template <class Body>
  void for_each_chunk(int64_t item, const Body& body) const {
    const int64_t end = std::min((item + 1) * kItem, tensor_.numel);
    for (int64_t begin = item * kItem; begin < end; begin += kReductionChunk) {
      body(begin / kReductionChunk, begin, std::min(kReductionChunk, end - begin));
    }
  }

  TensorDesc tensor_;
  int32_t index_;
  const GroupDesc& group_;
  const RuleInfo& info_;
  float multiplier_;
  int64_t step_;
  TensorSums sums_;
  StepContext context_{};
  NormalizeScratch scratch_;
  int64_t matrices_ = 0, height_ = 1, slabs_ = 0, panels_ = 0;
  std::vector<double> row_sums_, column_sums_, update_sums_, param_sums_;
  std::unique_ptr<float[]> row_factors_, column_factors_;
  alignas(16) unsigned char hyper_[kMaxHyperBytes];
};

// Work items of several members, in order.
class Items {
 public:
  void add(int32_t member, int64_t count) {
    if (count == 0) return;
    members_.push_back(member);
    ends_.push_back(size() + count);
  }
  int64_t size() const { return ends_.empty() ? 0 : ends_.back(); }
  // Calls body(member, item of that member) for all of them, from `threads` threads.
  template <class Body>
  void for_each(int threads, const Body& body) const {
    parallel_items(size(), threads, [&](int64_t i) {
      const size_t at = static_cast<size_t>(std::upper_bound(ends_.begin(), ends_.end(), i) - ends_.begin());
      body(members_[at], i - (at == 0 ? 0 : ends_[at - 1]));
    });
  }

 private:
  std::vector<int32_t> members_;
  std::vector<int64_t> ends_;
};

void step_wave(std::vector<Member>& wave, const Kernels& kernels, int threads, HealthCounts* health) {
  Items gradients, params, matrices, updates, chunks;
  for (size_t k = 0; k < wave.size(); ++k) {
    const int32_t i = static_cast<int32_t>(k);
    Member& member = wave[k];
    member.settle();
    if (member.is_matrix()) {
      gradients.add(i, member.units());
      matrices.add(i, 1);
    }
    if (member.reads_weights()) params.add(i, member.items());
    updates.add(i, member.is_matrix() ? member.units() : member.items());
    chunks.add(i, member.items());
  }
  gradients.for_each(threads, [&](int32_t k, int64_t i) { wave[k].sum_gradient(kernels, i); });
  matrices.for_each(threads, [&](int32_t k, int64_t) { wave[k].factor(kernels); });
  updates.for_each(threads, [&](int32_t k, int64_t i) { wave[k].sum_update(kernels, i); });
  params.for_each(threads, [&](int32_t k, int64_t i) { wave[k].sum_param(kernels, i); });
  {
    const IeeeMode ieee;
    for (Member& member : wave) member.finish_sums();
  }
  chunks.for_each(threads, [&](int32_t k, int64_t i) {
    const Member& member = wave[k];
    const int64_t begin = i == 0 ? 0 : member.cut(i * kItem);
    const int64_t end = (i + 1) * kItem < member.numel() ? member.cut((i + 1) * kItem) : member.numel();
    member.step(kernels, begin, end - begin, health);
  });
}

}  // namespace

void step_normalizing(const std::vector<TensorDesc>& tensors, const std::vector<int32_t>& members,
                      const std::vector<GroupDesc>& groups, const Kernels& kernels, int threads,
                      HealthCounts* health) {
  std::vector<Member> wave;
  int64_t held = 0;
  for (const int32_t index : members) {
    const TensorDesc& tensor = tensors[index];
    if (tensor.numel == 0) continue;
    wave.emplace_back(tensor, index, groups[tensor.group]);
    held += tensor.numel;
    if (held < kWave && index != members.back()) continue;
    step_wave(wave, kernels, threads, health);
    wave.clear();
    held = 0;
  }
  if (!wave.empty()) step_wave(wave, kernels, threads, health);
}

}  // namespace fusedopt::cpu

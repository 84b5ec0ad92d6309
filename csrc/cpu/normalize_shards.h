// The step of shards under rules that normalize (rules/normalize.h): the passes of normalize.h, between which ranks add
// up what each has found in its shard.
#pragma once

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "core/registry.h"
#include "core/tensors.h"
#include "cpu/kernels.h"
#include "cpu/normalize.h"
#include "cpu/normalize_member.h"

namespace fusedopt::cpu {

// What a sum goes over: the columns of a row, the rows of a column, or everything.
enum class Over { kColumns, kRows, kAll };

struct Shard {
  TensorDesc tensor;
  Whole whole;
  std::array<int32_t, 3> channels{};  // by Over: sums of one channel are added up over the same ranks
};

// One step of all shards. In each round ranks add up, channel by channel, the numbers that `sum` has found:
//
//   0   sums of squares of rows, where columns are cut
//   1   sums of squares of columns, sums of the averages of rows, sums of squares of weights
//   2   sums of squares of updates
//
// They come as the reference asks for them, shard by shard in the order given, but channel by
// channel: the channel first that is met first.
class ShardedStep {
 public:
  static constexpr int kRounds = 3;

  // Begins a step. The groups must stay where they are until its end.
  void begin(const std::vector<Shard>& shards, const std::vector<GroupDesc>& groups, int channels,
             const Kernels& kernels);
  // Ends it. Memory is kept for the next.
  void clear();

  // The channels of a round, in order, and how many numbers each has.
  using Counts = std::vector<std::pair<int32_t, int64_t>>;
  const Counts& counts(int round) const { return counts_[round]; }

  // Finds the numbers of a round, given what those of the round before came to.
  void sum(int round, const double* totals, double* sums, int threads);

  // Takes the step, given what the numbers of the last round came to. `recording` is that of cpu::step.
  void step(const double* totals, int threads, const Recording& recording);

 private:
  // Where the numbers of a member are in those of their rounds.
  struct Places {
    int64_t rows = 0, columns = 0, averages = 0, weights = 0, update = 0;
  };

  void place(const std::vector<Shard>& shards, int channels);
  void sum_squares(int threads);
  void take_rows(size_t i, double* sums);
  void take_columns(size_t i, const double* totals, double* sums);
  void take_totals(size_t i, const double* totals);

  const Kernels* kernels_ = nullptr;
  Workspace workspace_;
  std::vector<Member> members_;  // shards of parameters that have elements, here or elsewhere
  std::vector<size_t> shard_of_;
  std::vector<Whole> wholes_;
  std::vector<Places> places_;
  std::vector<double> weight_sums_;
  std::array<Counts, kRounds> counts_;
  std::vector<float*> steps_;  // of all shards
};

}  // namespace fusedopt::cpu

#include "cpu/normalize_shards.h"

#include <algorithm>

#include "cpu/parallel.h"

namespace fusedopt::cpu {

void ShardedStep::begin(const std::vector<Shard>& shards, const std::vector<GroupDesc>& groups, int channels,
                        const Kernels& kernels) {
  const IeeeMode ieee;  // scalars are derived here
  clear();
  kernels_ = &kernels;
  workspace_.doubles.forget();
  workspace_.floats.forget();
  members_.reserve(shards.size());
  for (size_t i = 0; i < shards.size(); ++i) {
    const Shard& shard = shards[i];
    steps_.push_back(shard.tensor.step);
    if (shard.whole.numel == 0) continue;
    members_.emplace_back(shard.tensor, shard.whole, static_cast<int32_t>(i), groups[shard.tensor.group], workspace_);
    shard_of_.push_back(i);
    wholes_.push_back(shard.whole);
  }
  workspace_.doubles.settle();
  workspace_.floats.settle();
  for (Member& member : members_) member.settle();
  weight_sums_.assign(members_.size(), 0.0);
  place(shards, channels);
}

void ShardedStep::clear() {
  members_.clear();
  shard_of_.clear();
  wholes_.clear();
  steps_.clear();
}

void ShardedStep::place(const std::vector<Shard>& shards, int channels) {
  struct Run {
    int round;
    size_t slot;  // of its channel in counts_
    int64_t* place;
  };
  std::vector<Run> runs;
  std::array<std::vector<int32_t>, kRounds> slots;  // by channel; -1 if it has none yet
  slots.fill(std::vector<int32_t>(static_cast<size_t>(channels), -1));
  for (Counts& counts : counts_) counts.clear();
  places_.assign(members_.size(), {});
  for (size_t i = 0; i < members_.size(); ++i) {
    const auto want = [&](int round, Over over, int64_t count, int64_t& place) {
      const int32_t channel = shards[shard_of_[i]].channels[static_cast<size_t>(over)];
      int32_t& slot = slots[round][channel];
      if (slot < 0) {
        slot = static_cast<int32_t>(counts_[round].size());
        counts_[round].emplace_back(channel, 0);
      }
      place = counts_[round][slot].second;
      counts_[round][slot].second += count;
      runs.push_back({round, static_cast<size_t>(slot), &place});
    };
    const MatrixCut& cut = members_[i].cut();
    if (wholes_[i].cuts_columns) want(0, Over::kColumns, cut.rows(), places_[i].rows);
    if (members_[i].is_matrix()) {
      want(1, Over::kRows, cut.columns(), places_[i].columns);
      want(1, Over::kRows, cut.matrices, places_[i].averages);
    }
    if (members_[i].reads_weights()) want(1, Over::kAll, 1, places_[i].weights);
    want(2, Over::kAll, 1, places_[i].update);
  }
  std::array<std::vector<int64_t>, kRounds> begins;
  for (int round = 0; round < kRounds; ++round) {
    int64_t begin = 0;
    for (const auto& [channel, count] : counts_[round]) {
      begins[round].push_back(begin);
      begin += count;
    }
  }
  for (const Run& run : runs) *run.place += begins[run.round][run.slot];
}

void ShardedStep::sum(int round, const double* totals, double* sums, int threads) {
  const auto for_each_member = [&](const auto& use) {
    parallel_items(static_cast<int64_t>(members_.size()), threads, [&](int64_t i) { use(static_cast<size_t>(i)); });
  };
  if (round == 0) {
    sum_squares(threads);
    for_each_member([&](size_t i) { take_rows(i, sums); });
  } else if (round == 1) {
    for_each_member([&](size_t i) { take_columns(i, totals, sums); });
  } else {
    for_each_member([&](size_t i) { take_totals(i, totals); });
    Items second;
    for (Member& member : members_) {
      if (member.is_matrix() && member.needs_second_pass()) second.add(member, member.units());
    }
    parallel_items(second.size(), threads, [&](int64_t i) {
      const auto [member, unit] = second.at(i);
      member->sum_updates(*kernels_, unit);
    });
    for_each_member([&](size_t i) { sums[places_[i].update] = members_[i].update_sum(); });
  }
}

// The first pass over everything.
void ShardedStep::sum_squares(int threads) {
  Items units, elements;
  for (Member& member : members_) {
    if (member.is_matrix()) {
      units.add(member, member.units());
    } else {
      elements.add(member, member.items());
    }
  }
  parallel_items(units.size() + elements.size(), threads, [&](int64_t i) {
    if (i < units.size()) {
      const auto [member, unit] = units.at(i);
      member->sum_squares(*kernels_, unit);
    } else {
      const auto [member, item] = elements.at(i - units.size());
      member->sum_elements(*kernels_, item);
    }
  });
}

void ShardedStep::take_rows(size_t i, double* sums) {
  Member& member = members_[i];
  if (!member.is_matrix() || member.has_whole_rows()) return;
  for (int64_t r = 0; r < member.cut().rows(); ++r) {
    const double sum = member.row_sum(r);
    if (wholes_[i].cuts_columns) {
      sums[places_[i].rows + r] = sum;
    } else {
      member.average_row(r, sum);
    }
  }
}

void ShardedStep::take_columns(size_t i, const double* totals, double* sums) {
  Member& member = members_[i];
  const Places& places = places_[i];
  const MatrixCut& cut = member.cut();
  if (member.reads_weights()) sums[places.weights] = member.param_sum();
  if (!member.is_matrix()) return;
  for (int64_t r = 0; wholes_[i].cuts_columns && r < cut.rows(); ++r) member.average_row(r, totals[places.rows + r]);
  for (int64_t matrix = 0; matrix < cut.matrices; ++matrix) {
    double* columns = sums + places.columns + matrix * cut.column_count;
    if (member.units() == 0) {
      std::fill_n(columns, cut.column_count, 0.0);
    } else {
      std::copy_n(member.column_sums(matrix), cut.column_count, columns);
    }
    sums[places.averages + matrix] = member.sum_of_averages(*kernels_, matrix);
  }
}

void ShardedStep::take_totals(size_t i, const double* totals) {
  Member& member = members_[i];
  const Places& places = places_[i];
  const MatrixCut& cut = member.cut();
  if (member.reads_weights()) weight_sums_[i] = totals[places.weights];
  for (int64_t matrix = 0; matrix < cut.matrices; ++matrix) {
    member.average_columns(matrix, totals + places.columns + matrix * cut.column_count);
    member.factor_rows(matrix, totals[places.averages + matrix]);
  }
}

void ShardedStep::step(const double* totals, int threads, const Recording& recording) {
  Items steps;
  {
    const IeeeMode ieee;
    for (size_t i = 0; i < members_.size(); ++i) {
      members_[i].derive_from(weight_sums_[i], totals[places_[i].update]);
      steps.add(members_[i], members_[i].items());
    }
  }
  // The last that were read first, as they are still in a cache.
  parallel_items(steps.size(), threads, [&](int64_t i) {
    const auto [member, item] = steps.at(steps.size() - 1 - i);
    member->step(*kernels_, item, recording);
  });
  for (float* step : steps_) *step += 1.0f;
}

}  // namespace fusedopt::cpu

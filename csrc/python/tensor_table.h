// The tensors of one step, gathered from the optimizer's Python objects.
//
// Parameters, gradients and states may all have been replaced since the last step (FSDP2 and
// load_state_dict do so), so everything is looked at anew, and of tensors nothing is kept alive between steps
// (record.h).
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "core/registry.h"
#include "cpu/normalize_shards.h"
#include "python/param_group.h"
#include "python/param_objects.h"
#include "python/read_tensor.h"
#include "python/record.h"
#include "python/versions.h"

namespace fusedopt {

// The numel, rows, columns, matrices and cuts_columns of a cpu::Whole.
using WholeOfShard = std::tuple<int64_t, int64_t, int64_t, int64_t, bool>;

class TensorTable {
 public:
  explicit TensorTable(Device device) : device_(device) {}

  // Starts a new step.
  void clear();

  // Adds the next param group. `config` names every hyperparameter of the rule; a missing or unknown name
  // raises. `roundings` holds a Rounding for each state, `rounding` is the parameters',
  // `master` a Master and `master_key` its name in a parameter's state. `param_group` and `positions` say where its
  // parameters are listed, for sums in list order; no positions if it has all of the param group.
  void add_group(const std::string& rule, const std::map<std::string, double>& config, uint32_t seed,
                 const std::vector<int>& roundings, int rounding, int master, const std::string& master_key,
                 bool skips_blocks, int param_group, const std::vector<int64_t>& positions);

  // Adds every parameter of a group that has a gradient and that the core can step as it lies in memory:
  // itself, its gradient and its state plain contiguous tensors of one shape, or DTensors of such. Returns the
  // positions of those that have a gradient and do not fit, for the caller to look at more closely. `whole_of`, unless
  // it is null, is asked of each DTensor of which ranks have parts, and of what is held here of it: None if nothing is
  // to be added up with other ranks, False if it does not fit, else the arguments `whole` and `channels` of `add`.
  std::vector<int64_t> collect(int group, const pybind11::list& params, const pybind11::dict& state,
                               const std::optional<pybind11::function>& whole_of);

  // Adds one parameter given tensor by tensor: `states` holds for each state a tuple of one tensor, or of
  // codes and scales; factors of the second moment, if the rule has them, come last. Returns false if it does not fit.
  // With a `whole` it is a shard of that, stepped by `sum_shards` and `step_shards`, with sums in these `channels`.
  bool add(int group, int64_t position, pybind11::handle param, pybind11::handle grad, const pybind11::tuple& states,
           pybind11::handle master, pybind11::handle step, int64_t first_index, int64_t segment, int64_t segment_stride,
           const std::optional<WholeOfShard>& whole, const std::array<int32_t, 3>& channels);

  // Tells autograd that the parameters have been written. `step` does so itself.
  void count_versions() { versions_.count(); }

  // Where the step's lists lie, in list order: a StepLists, for as long as nothing is added or cleared.
  uintptr_t batch(const std::vector<double>& grad_multipliers);

  // The same as numbers, for kernels that are not compiled here: kRowWords int64 for each tensor, see `write_row`.
  std::vector<int64_t> rows();

  // How the matrices of each are cut up for sums: the numbers of matrices, rows of a slab, slabs of a matrix, panels of
  // a slab (core/matrices.h).
  std::vector<int64_t> cuts();

  // On the CPU: steps everything, but for shards of a whole. Counts, if asked to:
  // {(group, position): {name of a count: number}}. `square_sums`, unless it is null, takes the sums of squares of
  // updates and of the weights after them: {(group, position): both}.
  pybind11::dict step(const std::vector<double>& grad_multipliers, int threads, bool counts_health,
                      std::optional<pybind11::dict> square_sums);
  int64_t count_square_sums() const;
  void square_sums(uintptr_t sums, int threads);
  size_t size() const { return lists_.tensors.size() + shards_.size(); }

  // The steps of shards of a whole (cpu/normalize_shards.h). `begin_shards` returns the channels of each round, and how
  // many numbers they have; `sums` and `totals` are where doubles lie.
  std::vector<cpu::ShardedStep::Counts> begin_shards(const std::vector<double>& grad_multipliers, int channels);
  void sum_shards(int round, uintptr_t totals, uintptr_t sums, int threads);
  pybind11::dict step_shards(uintptr_t totals, int threads, bool counts_health,
                             std::optional<pybind11::dict> square_sums);

 private:
  bool take_shard(int group, int64_t position, ParamObjects& objects, const std::optional<pybind11::function>& whole_of,
                  Record& record);
  bool take(int group, int64_t position, const ParamObjects& objects, const GlobalPlace& place, Record& record);
  void set_apart(const WholeOfShard& whole, const std::array<int32_t, 3>& channels);
  void list_groups(const std::vector<double>& grad_multipliers);
  template <class Step>
  pybind11::dict recorded(const std::vector<TensorDesc>& tensors, int threads, bool counts_health,
                          const std::optional<pybind11::dict>& square_sums, const Step& step);
  auto listed(const TensorDesc& tensor) const { return groups_[tensor.group].listed(tensor.position); }
  void sort();
  void sort(std::vector<TensorDesc>& tensors) const;

  std::vector<ParamGroup> groups_;
  Device device_;                   // where tensors must lie to be taken
  StepLists lists_;                 // its groups are filled by `list_groups`
  std::vector<cpu::Shard> shards_;  // of a whole; they are in no list
  cpu::ShardedStep sharded_step_;
  cpu::UpdateRecord updates_;                 // of the last step that summed them
  bool is_sorted_ = true;                     // the tensors, by group and position
  Versions versions_;                         // the parameters'
  Alive alive_;                               // what they point into and nothing else may hold
  std::vector<std::vector<Record>> records_;  // of each group, by position
};

}  // namespace fusedopt

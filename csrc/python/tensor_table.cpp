#include "python/tensor_table.h"

#include <algorithm>
#include <utility>

#include "core/matrices.h"
#include "cpu/dispatch.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

constexpr size_t kRowWords = 3 + 2 * kMaxStates + 6 + 4 + 2;

// Pointers, sizes, group, formats in one word, and factors (triton_kernels/table.py names them).
void write_row(const TensorDesc& tensor, int64_t* row) {
  const auto address = [](const void* data) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(data)); };
  int64_t formats = static_cast<int64_t>(tensor.param.dtype) | static_cast<int64_t>(tensor.grad.dtype) << 3 |
                    static_cast<int64_t>(tensor.master.dtype) << 6 | static_cast<int64_t>(tensor.master_format) << 9 |
                    static_cast<int64_t>(tensor.param.rounding) << 12 | static_cast<int64_t>(tensor.skips_blocks) << 29;
  *row++ = address(tensor.param.data);
  *row++ = address(tensor.grad.data);
  *row++ = address(tensor.master.data);
  for (const Buffer& state : tensor.states) *row++ = address(state.data);
  for (const Buffer& state : tensor.states) *row++ = address(state.scales);
  for (int k = 0; k < kMaxStates; ++k) {
    formats |= static_cast<int64_t>(tensor.states[k].dtype) << (13 + 3 * k) |
               static_cast<int64_t>(tensor.states[k].rounding) << (25 + k);
  }
  *row++ = address(tensor.step);
  *row++ = tensor.numel;
  *row++ = tensor.row;
  *row++ = tensor.first_index;
  *row++ = tensor.group;
  *row++ = formats;
  *row++ = address(tensor.factors.rows);
  *row++ = address(tensor.factors.columns);
  *row++ = tensor.factors.row_count;
  *row++ = tensor.factors.column_count;
  *row++ = tensor.segment;
  *row++ = tensor.segment_stride;
}

}  // namespace

void TensorTable::clear() {
  groups_.clear();
  lists_.tensors.clear();
  shards_.clear();
  sharded_step_.clear();
  alive_.clear();
  versions_.clear();
  is_sorted_ = true;
}

void TensorTable::add_group(const std::string& rule, const std::map<std::string, double>& config, uint32_t seed,
                            const std::vector<int>& roundings, int rounding, int master, const std::string& master_key,
                            bool skips_blocks, int param_group, const std::vector<int64_t>& positions) {
  groups_.emplace_back(rule, config, seed, roundings, rounding, master, master_key, skips_blocks, param_group,
                       positions);
  if (!positions.empty()) is_sorted_ = false;
}

bool TensorTable::take(int group, int64_t position, const ParamObjects& objects, const GlobalPlace& place,
                       Record& record) {
  TensorDesc& desc = lists_.tensors.emplace_back();
  if (!record.describe(groups_[group], objects, device_, desc)) {
    lists_.tensors.pop_back();
    return false;
  }
  desc.first_index = place.first_index;
  desc.segment = place.segment;
  desc.segment_stride = place.segment_stride;
  desc.group = group;
  desc.position = position;
  desc.skips_blocks = groups_[group].skips_blocks;
  versions_.add(objects.param, record.implementation());
  return true;
}

std::vector<int64_t> TensorTable::collect(int group, const py::list& params, const py::dict& state,
                                          const std::optional<py::function>& whole_of) {
  static PyObject* const kGrad = PyUnicode_InternFromString("grad");
  // A cold step waits for memory here: tensor objects lie scattered and each is visited once. So they are
  // asked for, where they lay last time, some parameters ahead.
  constexpr Py_ssize_t kAhead = 8;
  const ParamGroup& settings = groups_.at(group);
  const size_t state_count = settings.states.size();
  const Py_ssize_t count = PyList_GET_SIZE(params.ptr());
  if (records_.size() < groups_.size()) records_.resize(groups_.size());
  std::vector<Record>& records = records_[group];
  records.resize(count);

  StateEntries entries(state.ptr());
  std::vector<int64_t> missed;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (i + kAhead < count) records[i + kAhead].prefetch(state_count);
    PyObject* param = PyList_GET_ITEM(params.ptr(), i);
    auto grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(param, kGrad));
    if (!grad) throw py::error_already_set();
    if (grad.is_none()) continue;

    ParamObjects objects;
    objects.param = param;
    objects.grad = grad.ptr();
    const bool is_taken = objects.find(settings, entries.find(param)) &&
                          (is_dtensor(param) ? take_shard(group, i, objects, whole_of, records[i])
                                             : take(group, i, objects, {}, records[i]));
    if (is_taken) {
      alive_.push_back(std::move(grad));  // nothing else may hold it while it is read without the GIL
    } else {
      missed.push_back(i);
    }
  }
  return missed;
}

bool TensorTable::take_shard(int group, int64_t position, ParamObjects& objects,
                             const std::optional<py::function>& whole_of, Record& record) {
  PyObject* param = objects.param;
  ShardRecord& shard = record.shard();
  if (!shard.find(param, objects.grad)) return false;
  std::optional<WholeOfShard> whole;
  std::array<int32_t, 3> channels{};
  if (whole_of.has_value() && !shard.is_whole()) {
    const py::object answer = (*whole_of)(py::handle(param), py::handle(local_of(param, alive_)));
    if (answer.is(py::bool_(false))) return false;
    if (!answer.is_none())
      std::tie(whole, channels) = answer.cast<std::pair<std::optional<WholeOfShard>, std::array<int32_t, 3>>>();
  }
  shard.unwrap(objects, alive_);
  if (!take(group, position, objects, shard.place(), record)) return false;
  // Autograd counts the versions of a DTensor apart from those of what it holds.
  versions_.add(param, shard.implementation());
  if (whole.has_value()) set_apart(*whole, channels);
  return true;
}

bool TensorTable::add(int group, int64_t position, py::handle param, py::handle grad, const py::tuple& states,
                      py::handle master, py::handle step, int64_t first_index, int64_t segment, int64_t segment_stride,
                      const std::optional<WholeOfShard>& whole, const std::array<int32_t, 3>& channels) {
  const size_t dense = groups_.at(group).states.size();
  if (states.size() != dense + (groups_[group].is_factored() ? 2 : 0))
    throw py::value_error("one tuple of tensors is needed for every state of the rule");
  ParamObjects objects;
  objects.param = param.ptr();
  objects.grad = grad.ptr();
  objects.master = master.is_none() ? nullptr : master.ptr();
  objects.step = step.ptr();
  for (size_t i = 0; dense + i < states.size(); ++i) {
    objects.factors[i] = PyTuple_GET_ITEM(py::tuple(states[dense + i]).ptr(), 0);
  }
  for (size_t k = 0; k < dense; ++k) {
    const py::tuple tensors = states[k];
    if (tensors.size() != 1 && tensors.size() != 2) throw py::value_error("a state is one tensor, or codes and scales");
    objects.states[k] = PyTuple_GET_ITEM(tensors.ptr(), 0);
    objects.scales[k] = tensors.size() == 2 ? PyTuple_GET_ITEM(tensors.ptr(), 1) : nullptr;
  }
  Record unused;
  if (!take(group, position, objects, {first_index, segment, segment_stride}, unused)) return false;
  for (const py::handle tensor : {param, grad, step, master, py::handle(states)}) {
    alive_.push_back(py::reinterpret_borrow<py::object>(tensor));
  }
  if (whole.has_value()) set_apart(*whole, channels);
  is_sorted_ = false;
  return true;
}

// Makes the tensor that was taken last a shard of a whole.
void TensorTable::set_apart(const WholeOfShard& whole, const std::array<int32_t, 3>& channels) {
  const auto& [numel, rows, columns, matrices, cuts_columns] = whole;
  shards_.push_back({lists_.tensors.back(), {numel, rows, columns, matrices, cuts_columns}, channels});
  lists_.tensors.pop_back();
}

void TensorTable::sort() {
  if (is_sorted_) return;
  sort(lists_.tensors);
  is_sorted_ = true;
}

void TensorTable::sort(std::vector<TensorDesc>& tensors) const {
  std::sort(tensors.begin(), tensors.end(),
            [&](const TensorDesc& a, const TensorDesc& b) { return listed(a) < listed(b); });
}

void TensorTable::list_groups(const std::vector<double>& grad_multipliers) {
  if (grad_multipliers.size() != groups_.size()) throw py::value_error("one gradient multiplier is needed per group");
  lists_.groups.clear();
  for (size_t i = 0; i < groups_.size(); ++i) {
    lists_.groups.push_back(groups_[i].desc);
    lists_.groups.back().grad_multiplier = grad_multipliers[i];
  }
}

std::vector<int64_t> TensorTable::rows() {
  sort();
  std::vector<int64_t> words(lists_.tensors.size() * kRowWords);
  for (size_t i = 0; i < lists_.tensors.size(); ++i) write_row(lists_.tensors[i], &words[i * kRowWords]);
  return words;
}

std::vector<int64_t> TensorTable::cuts() {
  sort();
  std::vector<int64_t> words;
  words.reserve(lists_.tensors.size() * 4);
  for (const TensorDesc& tensor : lists_.tensors) {
    const MatrixCut cut = MatrixCut::of(tensor.factors, tensor.numel);
    words.insert(words.end(), {cut.matrices, cut.height, cut.slabs, cut.panels});
  }
  return words;
}

uintptr_t TensorTable::batch(const std::vector<double>& grad_multipliers) {
  list_groups(grad_multipliers);
  sort();
  return reinterpret_cast<uintptr_t>(&lists_);
}

// What step(recording) records of tensors.
template <class Step>
py::dict TensorTable::recorded(const std::vector<TensorDesc>& tensors, int threads, bool counts_health,
                               const std::optional<py::dict>& square_sums, const Step& step) {
  std::vector<HealthCounts> health(counts_health ? tensors.size() : 0);
  std::vector<UpdateSums> sums;
  {
    const py::gil_scoped_release released;
    if (square_sums) updates_.begin(tensors);
    step(cpu::Recording{counts_health ? health.data() : nullptr, square_sums ? &updates_ : nullptr});
    if (square_sums) sums = updates_.totals(cpu::selected_kernels(), threads);
  }
  count_versions();
  for (size_t i = 0; i < sums.size(); ++i) {
    (*square_sums)[py::make_tuple(tensors[i].group, tensors[i].position)] =
        py::make_tuple(sums[i].update, sums[i].weight);
  }
  py::dict found;
  for (size_t i = 0; i < health.size(); ++i) {
    py::dict counts;
    for (const HealthCount& each : kHealthCounts) counts[each.name] = health[i].*each.count;
    found[py::make_tuple(tensors[i].group, tensors[i].position)] = counts;
  }
  return found;
}

py::dict TensorTable::step(const std::vector<double>& grad_multipliers, int threads, bool counts_health,
                           std::optional<py::dict> square_sums) {
  list_groups(grad_multipliers);
  return recorded(lists_.tensors, threads, counts_health, square_sums, [&](const cpu::Recording& recording) {
    cpu::step(lists_.tensors, lists_.groups, threads, recording);
  });
}

std::vector<cpu::ShardedStep::Counts> TensorTable::begin_shards(const std::vector<double>& grad_multipliers,
                                                                int channels) {
  list_groups(grad_multipliers);
  // All ranks must have the same order, and how a shard was taken may differ.
  std::sort(shards_.begin(), shards_.end(),
            [&](const cpu::Shard& a, const cpu::Shard& b) { return listed(a.tensor) < listed(b.tensor); });
  for (const cpu::Shard& shard : shards_) {
    for (const int32_t channel : shard.channels) {
      if (channel < 0 || channel >= channels) throw py::value_error("a channel of a shard is not among the step's");
    }
  }
  sharded_step_.begin(shards_, lists_.groups, channels, cpu::selected_kernels());
  std::vector<cpu::ShardedStep::Counts> counts;
  for (int round = 0; round < cpu::ShardedStep::kRounds; ++round) counts.push_back(sharded_step_.counts(round));
  return counts;
}

void TensorTable::sum_shards(int round, uintptr_t totals, uintptr_t sums, int threads) {
  const py::gil_scoped_release released;
  sharded_step_.sum(round, reinterpret_cast<const double*>(totals), reinterpret_cast<double*>(sums), threads);
}

py::dict TensorTable::step_shards(uintptr_t totals, int threads, bool counts_health,
                                  std::optional<py::dict> square_sums) {
  std::vector<TensorDesc> tensors;
  for (const cpu::Shard& shard : shards_) tensors.push_back(shard.tensor);
  return recorded(tensors, threads, counts_health, square_sums, [&](const cpu::Recording& recording) {
    sharded_step_.step(reinterpret_cast<const double*>(totals), threads, recording);
  });
}

int64_t TensorTable::count_square_sums() const {
  int64_t count = cpu::count_square_sums(lists_.tensors);
  for (const cpu::Shard& shard : shards_) count += cpu::count_square_sums({shard.tensor});
  return count;
}

void TensorTable::square_sums(uintptr_t sums, int threads) {
  sort();
  std::vector<TensorDesc> all;
  if (!shards_.empty()) {
    all = lists_.tensors;
    for (const cpu::Shard& shard : shards_) all.push_back(shard.tensor);
    sort(all);
  }
  const py::gil_scoped_release released;
  cpu::square_sums(shards_.empty() ? lists_.tensors : all, reinterpret_cast<double*>(sums), threads);
}

}  // namespace fusedopt

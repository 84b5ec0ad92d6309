#include "python/tensor_table.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "cpu/dispatch.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

Buffer buffer_of(const TensorView& view) { return {view.data, view.dtype, Rounding::kNearest}; }

int find_rule(const std::string& name) {
  for (size_t i = 0; i < rules().size(); ++i) {
    if (name == rules()[i].name) return static_cast<int>(i);
  }
  throw py::value_error("the core has no rule '" + name + "'");
}

py::object interned(const char* text) { return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(text)); }

}  // namespace

void TensorTable::clear() {
  groups_.clear();
  tensors_.clear();
  alive_.clear();
  is_sorted_ = true;
}

void TensorTable::forget() { records_.clear(); }

void TensorTable::add_group(const std::string& rule, const std::map<std::string, double>& config, uint32_t seed,
                            const std::vector<int>& roundings) {
  Group group;
  group.desc.rule = find_rule(rule);
  group.desc.seed = seed;
  const RuleInfo& info = rules()[group.desc.rule];
  for (const RuleField& field : info.fields) {
    const auto found = config.find(field.name);
    if (found == config.end())
      throw py::type_error("rule '" + rule + "' needs the hyperparameter '" + field.name + "'");
    std::memcpy(group.desc.config + field.offset, &found->second, sizeof(double));
  }
  if (config.size() != info.fields.size()) {
    throw py::type_error("rule '" + rule + "' was given a hyperparameter that it does not have");
  }
  if (roundings.size() != static_cast<size_t>(info.states)) {
    throw py::value_error("rule '" + rule + "' has " + std::to_string(info.states) + " states");
  }
  for (int k = 0; k < info.states; ++k) {
    group.roundings.push_back(static_cast<Rounding>(roundings[k]));
    group.state_keys.push_back(interned(info.state_names[k]));
  }
  groups_.push_back(std::move(group));
}

bool TensorTable::Known::still(PyObject* now, int64_t size) const {
  return object.ptr() == now && numel == size && buffer.data == data_pointer(now);
}

void TensorTable::Record::prefetch(size_t state_count) const {
  param.prefetch();
  grad.prefetch();
  step.place.prefetch();
  for (size_t k = 0; k < state_count; ++k) states[k].place.prefetch();
}

bool TensorTable::append(int group, int64_t position, PyObject* param, PyObject* grad, PyObject* const* states,
                         PyObject* step, int64_t first_index, Record& record) {
  const std::vector<Rounding>& roundings = groups_[group].roundings;
  TensorView param_view, view;
  TensorDesc desc;
  if (!read_tensor(param, param_view)) return false;
  desc.param = buffer_of(param_view);
  // A lazily negated parameter is a rarity, and looked for when a parameter is first met only.
  if (record.param.object != param && is_negated(param)) return false;
  record.param = {param, param_view.shape};
  if (!read_tensor(grad, view) || is_negated(grad) || !same_shape(view, param_view)) return false;
  desc.grad = buffer_of(view);
  record.grad = {grad, view.shape};
  const size_t count = roundings.size();
  for (size_t k = 0; k < count; ++k) {
    Known& known = record.states[k];
    if (!known.still(states[k], param_view.numel)) {
      if (!read_tensor(states[k], view) || !same_shape(view, param_view)) return false;
      known = {py::reinterpret_borrow<py::object>(states[k]), buffer_of(view), view.numel, {states[k], view.shape}};
    }
    desc.states[k] = known.buffer;
    if (desc.states[k].dtype != DType::kFloat32) desc.states[k].rounding = roundings[k];
  }
  if (!record.step.still(step, 1)) {
    if (!read_tensor(step, view) || view.dtype != DType::kFloat32 || view.numel != 1) return false;
    record.step = {py::reinterpret_borrow<py::object>(step), buffer_of(view), 1, {step, view.shape}};
  }
  desc.step = static_cast<float*>(record.step.buffer.data);
  desc.numel = param_view.numel;
  desc.first_index = first_index;
  desc.group = group;
  desc.position = position;
  tensors_.push_back(desc);
  return true;
}

// Finds entries of optimizer.state. Asked for in the dict's own order, as a rule, they are found without
// hashing, which for a tensor is a call into Python.
class StateEntries {
 public:
  explicit StateEntries(PyObject* state) : state_(state) { advance(); }

  PyObject* find(PyObject* param) {
    if (key_ == param) {
      PyObject* held = value_;
      advance();
      return held;
    }
    PyObject* held = PyDict_GetItemWithError(state_, param);
    if (held == nullptr && PyErr_Occurred()) throw py::error_already_set();
    // From here on in order again, where a group begins in the middle of the dict.
    Py_ssize_t position = 0;
    PyObject* key;
    if (held != nullptr && !searched_) {
      searched_ = true;
      while (PyDict_Next(state_, &position, &key, nullptr)) {
        if (key == param) {
          position_ = position;
          advance();
          break;
        }
      }
    }
    return held;
  }

 private:
  void advance() {
    if (!PyDict_Next(state_, &position_, &key_, &value_)) key_ = value_ = nullptr;
  }

  PyObject* state_;
  Py_ssize_t position_ = 0;
  PyObject* key_ = nullptr;
  PyObject* value_ = nullptr;
  bool searched_ = false;
};

std::vector<int64_t> TensorTable::collect(int group, const py::list& params, const py::dict& state) {
  static PyObject* const kGrad = PyUnicode_InternFromString("grad");
  static PyObject* const kStep = PyUnicode_InternFromString("step");
  // A cold step waits for memory here: tensor objects lie scattered and each is visited once. So they are
  // asked for, where they lay last time, some parameters ahead.
  constexpr Py_ssize_t kAhead = 8;
  const std::vector<py::object>& state_keys = groups_.at(group).state_keys;
  const size_t state_count = state_keys.size();
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

    PyObject* held = entries.find(param);
    PyObject* step = nullptr;
    PyObject* states[kMaxStates];
    bool is_complete = held != nullptr && PyDict_CheckExact(held);
    if (is_complete) {
      step = PyDict_GetItem(held, kStep);
      is_complete = step != nullptr;
      for (size_t k = 0; k < state_count && is_complete; ++k) {
        states[k] = PyDict_GetItem(held, state_keys[k].ptr());
        is_complete = states[k] != nullptr;
      }
    }
    if (is_complete && append(group, i, param, grad.ptr(), states, step, 0, records[i])) {
      alive_.push_back(std::move(grad));  // nothing else may hold it while it is read without the GIL
    } else {
      missed.push_back(i);
    }
  }
  return missed;
}

bool TensorTable::add(int group, int64_t position, py::handle param, py::handle grad, const py::tuple& states,
                      py::handle step, int64_t first_index) {
  if (states.size() != groups_.at(group).state_keys.size())
    throw py::value_error("one tensor is needed for every state of the rule");
  PyObject* pointers[kMaxStates];
  for (size_t k = 0; k < states.size(); ++k) pointers[k] = PyTuple_GET_ITEM(states.ptr(), static_cast<Py_ssize_t>(k));
  Record unused;
  if (!append(group, position, param.ptr(), grad.ptr(), pointers, step.ptr(), first_index, unused)) return false;
  for (const py::handle tensor : {param, grad, step, py::handle(states)}) {
    alive_.push_back(py::reinterpret_borrow<py::object>(tensor));
  }
  is_sorted_ = false;
  return true;
}

void TensorTable::sort() {
  if (is_sorted_) return;
  std::sort(tensors_.begin(), tensors_.end(), [](const TensorDesc& a, const TensorDesc& b) {
    return std::pair(a.group, a.position) < std::pair(b.group, b.position);
  });
  is_sorted_ = true;
}

void TensorTable::step(const std::vector<double>& grad_multipliers, int threads) const {
  if (grad_multipliers.size() != groups_.size()) throw py::value_error("one gradient multiplier is needed per group");
  std::vector<GroupDesc> groups;
  for (size_t i = 0; i < groups_.size(); ++i) {
    groups.push_back(groups_[i].desc);
    groups.back().grad_multiplier = grad_multipliers[i];
  }
  const py::gil_scoped_release released;
  cpu::step(tensors_, groups, threads);
}

int64_t TensorTable::count_square_sums() const { return cpu::count_square_sums(tensors_); }

void TensorTable::square_sums(uintptr_t sums, int threads) {
  sort();
  const py::gil_scoped_release released;
  cpu::square_sums(tensors_, reinterpret_cast<double*>(sums), threads);
}

}  // namespace fusedopt

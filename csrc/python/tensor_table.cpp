#include "python/tensor_table.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "cpu/dispatch.h"
#include "storage/blockwise8.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

Buffer buffer_of(const TensorView& view) {
  Buffer buffer;
  buffer.data = view.data;
  buffer.dtype = view.dtype;
  return buffer;
}

int find_rule(const std::string& name) {
  for (size_t i = 0; i < rules().size(); ++i) {
    if (name == rules()[i].name) return static_cast<int>(i);
  }
  throw py::value_error("the core has no rule '" + name + "'");
}

py::object interned(const std::string& text) {
  return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(text.c_str()));
}

constexpr size_t kRowWords = 3 + 2 * kMaxStates + 6 + 4;

bool is_float(DType dtype) { return dtype == DType::kFloat32 || dtype == DType::kBFloat16 || dtype == DType::kFloat16; }

// How many elements of a parameter lie in a row that blocks of codes do not cross.
int64_t row_of(const TensorView& param) {
  return param.ndim < 2 || param.numel == 0 ? 0 : param.numel / param.shape[0];
}

bool is_scales_of(const TensorView& scales, const TensorView& param) {
  if (param.numel == 0) return scales.dtype == DType::kUInt8 && scales.numel == 0;
  const int64_t row = row_of(param);
  return row > 0 && scales.dtype == DType::kUInt8 && scales.ndim == 2 && scales.shape[0] == param.shape[0] &&
         scales.shape[1] == (row + kBlock - 1) / kBlock;
}

// Whether a tensor's dtype is the one in which a master of this kind keeps what a parameter cannot.
bool is_master_dtype(Master master, DType dtype) {
  switch (master) {
    case Master::kKahan:
      return is_float(dtype);
    case Master::kSplit24:
      return dtype == DType::kInt8;
    case Master::kSplit32:
      return dtype == DType::kInt16;
    case Master::kFloat32:
      return dtype == DType::kFloat32;
    case Master::kNone:
      return false;
  }
  return false;
}

}  // namespace

void TensorTable::clear() {
  groups_.clear();
  lists_.tensors.clear();
  alive_.clear();
  is_sorted_ = true;
}

void TensorTable::forget() { records_.clear(); }

void TensorTable::add_group(const std::string& rule, const std::map<std::string, double>& config, uint32_t seed,
                            const std::vector<int>& roundings, int rounding, int master, const std::string& master_key,
                            int param_group, const std::vector<int64_t>& positions) {
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
  const size_t states = static_cast<size_t>(info.states);
  const size_t listed = states + (info.row_name == nullptr ? 0 : 2);
  if (roundings.size() != listed) {
    throw py::value_error("rule '" + rule + "' has " + std::to_string(listed) + " states");
  }
  for (size_t k = 0; k < states; ++k) {
    const std::string name = info.state_names[k];
    group.states.push_back({static_cast<Rounding>(roundings[k]), info.is_signed[k], interned(name),
                            interned(name + "_codes"), interned(name + "_scales")});
  }
  if (info.row_name != nullptr) group.factor_keys = {interned(info.row_name), interned(info.column_name)};
  group.param_group = param_group;
  group.positions = positions;
  if (!positions.empty()) is_sorted_ = false;
  group.rounding = static_cast<Rounding>(rounding);
  group.master = static_cast<Master>(master);
  group.master_key = interned(master_key);
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
  // Without these objects there is nothing at their places.
  for (size_t k = 0; k < state_count && scales[k].object; ++k) scales[k].place.prefetch();
  if (master.object) master.place.prefetch();
  for (const Known& factor : factors) {
    if (factor.object) factor.place.prefetch();
  }
}

bool TensorTable::append_state(const State& state, PyObject* object, PyObject* scales, const TensorView& param,
                               Known& known, Known& known_scales, TensorDesc& desc, Buffer& buffer) const {
  TensorView view;
  if (!known.still(object, param.numel)) {
    if (!read(object, view) || !same_shape(view, param)) return false;
    if (scales == nullptr ? !is_float(view.dtype) : view.dtype != DType::kUInt8) return false;
    known = {py::reinterpret_borrow<py::object>(object), buffer_of(view), view.numel, {object, view.shape}};
  }
  buffer = known.buffer;
  if (buffer.dtype != DType::kFloat32) buffer.rounding = state.rounding;
  buffer.is_signed = state.is_signed;
  if (scales == nullptr) return !buffer.is_blockwise();
  if (!buffer.is_blockwise()) return false;
  const int64_t row = row_of(param);
  const int64_t blocks = row == 0 ? 0 : param.shape[0] * ((row + kBlock - 1) / kBlock);
  if (!known_scales.still(scales, blocks)) {
    if (!read(scales, view) || !is_scales_of(view, param)) return false;
    known_scales = {py::reinterpret_borrow<py::object>(scales), buffer_of(view), view.numel, {scales, view.shape}};
  }
  buffer.scales = static_cast<uint8_t*>(known_scales.buffer.data);
  desc.row = row % kBlock == 0 ? param.numel : row;  // rows of whole blocks lie like one long row
  return true;
}

bool TensorTable::append_master(const Group& group, PyObject* object, const TensorView& param, Known& known,
                                TensorDesc& desc) const {
  const bool wanted = group.master != Master::kNone && param.dtype != DType::kFloat32;
  if (!wanted) return true;
  if (object == nullptr) return false;
  if (param.dtype != DType::kBFloat16 && group.master != Master::kFloat32) return false;
  if (!known.still(object, param.numel)) {
    TensorView view;
    if (!read(object, view) || !same_shape(view, param)) return false;
    if (!is_master_dtype(group.master, view.dtype)) return false;
    known = {py::reinterpret_borrow<py::object>(object), buffer_of(view), view.numel, {object, view.shape}};
  }
  desc.master = known.buffer;
  desc.master_format = group.master;
  return true;
}

bool TensorTable::append_factors(const Group& group, const Objects& objects, const TensorView& param, Record& record,
                                 TensorDesc& desc) const {
  if (!group.factor_keys[0]) return true;
  Factors& shapes = record.shapes;
  for (int i = 0; i < 2; ++i) {
    Known& known = record.factors[i];
    if (known.object && known.still(objects.factors[i], known.numel)) continue;
    TensorView view;
    if (!read(objects.factors[i], view) || view.dtype != DType::kFloat32 || view.ndim < 1) return false;
    known = {py::reinterpret_borrow<py::object>(objects.factors[i]),
             buffer_of(view),
             view.numel,
             {objects.factors[i], view.shape}};
    (i == 0 ? shapes.row_count : shapes.column_count) = view.shape[view.ndim - 1];
  }
  // As many matrices in the one as in the other, and in the parameter.
  const int64_t rows = shapes.row_count, columns = shapes.column_count;
  const int64_t matrices = rows == 0 || columns == 0 ? 0 : param.numel / (rows * columns);
  if (matrices * rows * columns != param.numel) return false;
  if (param.numel > 0 &&
      (record.factors[0].numel != matrices * rows || record.factors[1].numel != matrices * columns)) {
    return false;
  }
  desc.factors = {static_cast<float*>(record.factors[0].buffer.data),
                  static_cast<float*>(record.factors[1].buffer.data), rows, columns};
  return true;
}

bool TensorTable::append(int group_index, int64_t position, const Objects& objects, int64_t first_index,
                         Record& record) {
  const Group& group = groups_[group_index];
  TensorView param, view;
  TensorDesc desc;
  if (!read(objects.param, param) || !is_float(param.dtype)) return false;
  desc.param = buffer_of(param);
  if (param.dtype != DType::kFloat32) desc.param.rounding = group.rounding;
  // A lazily negated parameter is a rarity, and looked for when a parameter is first met only.
  if (record.param.object != objects.param && is_negated(objects.param)) return false;
  record.param = {objects.param, param.shape};
  if (!read(objects.grad, view) || is_negated(objects.grad)) return false;
  if (!is_float(view.dtype) || !same_shape(view, param)) return false;
  desc.grad = buffer_of(view);
  record.grad = {objects.grad, view.shape};
  for (size_t k = 0; k < group.states.size(); ++k) {
    if (!append_state(group.states[k], objects.states[k], objects.scales[k], param, record.states[k], record.scales[k],
                      desc, desc.states[k])) {
      return false;
    }
  }
  const int second_moment = rules()[group.desc.rule].second_moment;
  if (second_moment >= 0 && desc.states[second_moment].dtype != DType::kFloat32) return false;
  if (!append_factors(group, objects, param, record, desc)) return false;
  if (!append_master(group, objects.master, param, record.master, desc)) return false;
  if (!record.step.still(objects.step, 1)) {
    if (!read(objects.step, view) || view.dtype != DType::kFloat32 || view.numel != 1) return false;
    record.step = {py::reinterpret_borrow<py::object>(objects.step), buffer_of(view), 1, {objects.step, view.shape}};
  }
  desc.step = static_cast<float*>(record.step.buffer.data);
  desc.numel = param.numel;
  desc.first_index = first_index;
  desc.group = group_index;
  desc.position = position;
  lists_.tensors.push_back(desc);
  return true;
}

bool TensorTable::find_state(const Group& group, PyObject* held, Objects& objects) {
  static PyObject* const kStep = PyUnicode_InternFromString("step");
  if (held == nullptr || !PyDict_CheckExact(held)) return false;
  objects.step = PyDict_GetItem(held, kStep);
  if (objects.step == nullptr) return false;
  for (size_t k = 0; k < group.states.size(); ++k) {
    const State& state = group.states[k];
    objects.states[k] = PyDict_GetItem(held, state.key.ptr());
    objects.scales[k] = nullptr;
    if (objects.states[k] != nullptr) continue;
    objects.states[k] = PyDict_GetItem(held, state.codes_key.ptr());
    objects.scales[k] = PyDict_GetItem(held, state.scales_key.ptr());
    if (objects.states[k] == nullptr || objects.scales[k] == nullptr) return false;
  }
  for (size_t i = 0; group.factor_keys[0] && i < 2; ++i) {
    objects.factors[i] = PyDict_GetItem(held, group.factor_keys[i].ptr());
    if (objects.factors[i] == nullptr) return false;
  }
  // A parameter of 32 bits has none; append asks for what a 16-bit one needs.
  objects.master = group.master == Master::kNone ? nullptr : PyDict_GetItem(held, group.master_key.ptr());
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
  // A cold step waits for memory here: tensor objects lie scattered and each is visited once. So they are
  // asked for, where they lay last time, some parameters ahead.
  constexpr Py_ssize_t kAhead = 8;
  const Group& settings = groups_.at(group);
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

    Objects objects;
    objects.param = param;
    objects.grad = grad.ptr();
    if (find_state(settings, entries.find(param), objects) && append(group, i, objects, 0, records[i])) {
      alive_.push_back(std::move(grad));  // nothing else may hold it while it is read without the GIL
    } else {
      missed.push_back(i);
    }
  }
  return missed;
}

bool TensorTable::add(int group, int64_t position, py::handle param, py::handle grad, const py::tuple& states,
                      py::handle master, py::handle step, int64_t first_index) {
  const size_t dense = groups_.at(group).states.size();
  if (states.size() != dense + (groups_[group].factor_keys[0] ? 2 : 0))
    throw py::value_error("one tuple of tensors is needed for every state of the rule");
  Objects objects;
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
  if (!append(group, position, objects, first_index, unused)) return false;
  for (const py::handle tensor : {param, grad, step, master, py::handle(states)}) {
    alive_.push_back(py::reinterpret_borrow<py::object>(tensor));
  }
  is_sorted_ = false;
  return true;
}

void TensorTable::sort() {
  if (is_sorted_) return;
  const auto listed = [&](const TensorDesc& tensor) {
    const Group& group = groups_[tensor.group];
    return std::pair(group.param_group, group.positions.empty() ? tensor.position : group.positions[tensor.position]);
  };
  std::sort(lists_.tensors.begin(), lists_.tensors.end(),
            [&](const TensorDesc& a, const TensorDesc& b) { return listed(a) < listed(b); });
  is_sorted_ = true;
}

bool TensorTable::read(PyObject* object, TensorView& view) const {
  return read_tensor(object, view) && view.device == device_;
}

void TensorTable::list_groups(const std::vector<double>& grad_multipliers) {
  if (grad_multipliers.size() != groups_.size()) throw py::value_error("one gradient multiplier is needed per group");
  lists_.groups.clear();
  for (size_t i = 0; i < groups_.size(); ++i) {
    lists_.groups.push_back(groups_[i].desc);
    lists_.groups.back().grad_multiplier = grad_multipliers[i];
  }
}

// Pointers, sizes, group, formats in one word, and factors (triton_kernels/table.py names them).
void write_row(const TensorDesc& tensor, int64_t* row) {
  const auto address = [](const void* data) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(data)); };
  int64_t formats = static_cast<int64_t>(tensor.param.dtype) | static_cast<int64_t>(tensor.grad.dtype) << 3 |
                    static_cast<int64_t>(tensor.master.dtype) << 6 | static_cast<int64_t>(tensor.master_format) << 9 |
                    static_cast<int64_t>(tensor.param.rounding) << 12;
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
}

std::vector<int64_t> TensorTable::rows() {
  sort();
  std::vector<int64_t> words(lists_.tensors.size() * kRowWords);
  for (size_t i = 0; i < lists_.tensors.size(); ++i) write_row(lists_.tensors[i], &words[i * kRowWords]);
  return words;
}

uintptr_t TensorTable::batch(const std::vector<double>& grad_multipliers) {
  list_groups(grad_multipliers);
  sort();
  return reinterpret_cast<uintptr_t>(&lists_);
}

py::dict TensorTable::step(const std::vector<double>& grad_multipliers, int threads, bool counts_health) {
  list_groups(grad_multipliers);
  std::vector<HealthCounts> health(counts_health ? lists_.tensors.size() : 0);
  {
    const py::gil_scoped_release released;
    cpu::step(lists_.tensors, lists_.groups, threads, counts_health ? health.data() : nullptr);
  }
  py::dict found;
  for (size_t i = 0; i < health.size(); ++i) {
    py::dict counts;
    counts["stalled"] = health[i].stalled;
    counts["nonfinite_grads"] = health[i].nonfinite_grads;
    counts["codes"] = health[i].codes;
    counts["saturated_codes"] = health[i].saturated_codes;
    counts["nonfinite_blocks"] = health[i].nonfinite_blocks;
    found[py::make_tuple(lists_.tensors[i].group, lists_.tensors[i].position)] = counts;
  }
  return found;
}

int64_t TensorTable::count_square_sums() const { return cpu::count_square_sums(lists_.tensors); }

void TensorTable::square_sums(uintptr_t sums, int threads) {
  sort();
  const py::gil_scoped_release released;
  cpu::square_sums(lists_.tensors, reinterpret_cast<double*>(sums), threads);
}

}  // namespace fusedopt

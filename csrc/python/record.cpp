#include "python/record.h"

#include <algorithm>

#include "core/portable.h"
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

// Also false if it lies on another device than the parameter.
bool read_beside(const TensorView& param, PyObject* object, Known& known, TensorView& view) {
  return known.read(object, view) && view.device == param.device;
}

bool is_float(DType dtype) { return dtype == DType::kFloat32 || dtype == DType::kBFloat16 || dtype == DType::kFloat16; }

// How many elements of a parameter lie in a row that blocks of codes do not cross.
int64_t row_of(const TensorView& param) {
  if (param.ndim == 1) return param.numel;  // a flat buffer is one row
  return param.ndim == 0 || param.numel == 0 ? 0 : param.numel / param.shape[0];
}

bool is_scales_of(const TensorView& scales, const TensorView& param) {
  if (param.numel == 0) return scales.dtype == DType::kUInt8 && scales.numel == 0;
  const int64_t row = row_of(param);
  if (row == 0 || scales.dtype != DType::kUInt8 || scales.ndim != std::min(param.ndim, 2)) return false;
  return scales.shape[scales.ndim - 1] == divided_up(row, kBlock) &&
         (scales.ndim == 1 || scales.shape[0] == param.shape[0]);
}

// Whether they have a number for each row and each column of a parameter's matrices: those of its last two dimensions,
// or the one of its first dimension by all others.
bool are_factors_of(const TensorView& rows, const TensorView& columns, const TensorView& param) {
  const int ndim = param.ndim;
  if (ndim < 2) return false;
  const auto is = [&](const TensorView& view, int left_out) {
    if (view.ndim != ndim - 1) return false;
    for (int i = 0, j = 0; j < ndim; ++j) {
      if (j != left_out && view.shape[i++] != param.shape[j]) return false;
    }
    return true;
  };
  if (is(rows, ndim - 1) && is(columns, ndim - 2)) return true;
  return rows.ndim == 1 && columns.ndim == 1 && rows.shape[0] == param.shape[0] &&
         rows.shape[0] * columns.shape[0] == param.numel;
}

// Whether a tensor's dtype is the one in which a master of this kind keeps what a parameter cannot.
bool is_master_dtype(Master master, DType dtype) {
  switch (master) {
    case Master::kKahan:
      return is_float(dtype);
    case Master::kSplit24:
      return dtype == DType::kInt8;
    case Master::kSplit32:
      return dtype == DType::kInt16 || dtype == DType::kBFloat16;
    case Master::kFloat32:
      return dtype == DType::kFloat32;
    case Master::kNone:
      return false;
  }
  return false;
}

}  // namespace

bool Known::read(PyObject* object, TensorView& view) {
  if (last_ != nullptr && last_->object().ptr() == object && last_->view.data == data_pointer(object)) {
    view = last_->view;
    view.shape = view.copied_shape.data();
    return true;
  }
  if (!read_tensor(object, view)) return false;
  place = {object, view.shape};
  if (!reads_quickly()) {
    last_ = std::make_unique<Reading>(Reading{py::weakref(py::handle(object)), view});
  }
  return true;
}

bool Record::describe(const ParamGroup& group, const ParamObjects& objects, Device device, TensorDesc& desc) {
  TensorView param, grad;
  if (!read_tensor(objects.param, param) || !(param.device == device) || !is_float(param.dtype)) return false;
  desc.param = buffer_of(param);
  if (param.dtype != DType::kFloat32) desc.param.rounding = group.rounding;
  // A lazily negated parameter is a rarity, and looked for when a parameter is first met only.
  if (param_.object != objects.param && is_negated(objects.param)) return false;
  param_ = {objects.param, param.shape};
  implementation_ = implementation_of(param);
  if (!read_tensor(objects.grad, grad) || !(grad.device == param.device) || is_negated(objects.grad)) return false;
  if (!is_float(grad.dtype) || !same_shape(grad, param)) return false;
  desc.grad = buffer_of(grad);
  grad_ = {objects.grad, grad.shape};
  desc.numel = param.numel;
  for (size_t k = 0; k < group.states.size(); ++k) {
    if (!describe_state(group.states[k], objects, k, param, desc)) return false;
  }
  const RuleInfo& info = rules()[group.desc.rule];
  if (info.takes_quotient && info.second_moment >= 0 && desc.states[info.second_moment].dtype != DType::kFloat32) {
    return false;
  }
  if (group.is_factored() && !describe_factors(objects, param, desc)) return false;
  return describe_master(group, objects.master, param, desc) && describe_step(objects.step, param, desc);
}

bool Record::describe_state(const StateSpec& state, const ParamObjects& objects, size_t k, const TensorView& param,
                            TensorDesc& desc) {
  PyObject* scales = objects.scales[k];
  TensorView view;
  if (!read_beside(param, objects.states[k], states_[k], view) || !same_shape(view, param)) return false;
  Buffer& buffer = desc.states[k] = buffer_of(view);
  buffer.is_signed = state.is_signed;
  if (buffer.dtype != DType::kFloat32) buffer.rounding = state.rounding;
  if (scales == nullptr) return is_float(buffer.dtype);
  if (buffer.dtype != DType::kUInt8) return false;
  if (!read_beside(param, scales, scales_[k], view) || !is_scales_of(view, param)) return false;
  buffer.scales = static_cast<uint8_t*>(view.data);
  const int64_t row = row_of(param);
  desc.row = row % kBlock == 0 ? param.numel : row;  // rows of whole blocks lie like one long row
  return true;
}

bool Record::describe_factors(const ParamObjects& objects, const TensorView& param, TensorDesc& desc) {
  TensorView rows, columns;
  for (int i = 0; i < 2; ++i) {
    TensorView& view = i == 0 ? rows : columns;
    if (!read_beside(param, objects.factors[i], factors_[i], view) || view.dtype != DType::kFloat32) return false;
  }
  if (!are_factors_of(rows, columns, param)) return false;
  desc.factors = {static_cast<float*>(rows.data), static_cast<float*>(columns.data), rows.shape[rows.ndim - 1],
                  columns.shape[columns.ndim - 1]};
  return true;
}

bool Record::describe_master(const ParamGroup& group, PyObject* object, const TensorView& param, TensorDesc& desc) {
  if (group.master == Master::kNone || param.dtype == DType::kFloat32) return true;
  if (object == nullptr) return false;
  if (param.dtype != DType::kBFloat16 && group.master != Master::kFloat32) return false;
  TensorView view;
  if (!read_beside(param, object, master_, view) || !same_shape(view, param)) return false;
  if (!is_master_dtype(group.master, view.dtype)) return false;
  desc.master = buffer_of(view);
  // Kept as bfloat16 for the sake of collectives, which send no int16; what it holds are integers.
  if (group.master == Master::kSplit32) desc.master.dtype = DType::kInt16;
  desc.master_format = group.master;
  return true;
}

bool Record::describe_step(PyObject* object, const TensorView& param, TensorDesc& desc) {
  TensorView view;
  if (!read_beside(param, object, step_, view) || view.dtype != DType::kFloat32 || view.numel != 1) return false;
  desc.step = static_cast<float*>(view.data);
  return true;
}

void Record::prefetch(size_t state_count) const {
  if (shard_) shard_->prefetch();
  param_.prefetch();
  grad_.prefetch();
  step_.place.prefetch();
  for (size_t k = 0; k < state_count; ++k) states_[k].place.prefetch();
  // Where nothing was read there is nothing to ask for.
  for (size_t k = 0; k < state_count && scales_[k].place.object != nullptr; ++k) scales_[k].place.prefetch();
  if (master_.place.object != nullptr) master_.place.prefetch();
  for (const Known& factor : factors_) {
    if (factor.place.object != nullptr) factor.place.prefetch();
  }
}

}  // namespace fusedopt

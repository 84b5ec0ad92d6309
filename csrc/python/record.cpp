#include "python/record.h"

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
bool read_beside(const TensorView& param, PyObject* object, TensorView& view) {
  return read_tensor(object, view) && view.device == param.device;
}

bool is_float(DType dtype) { return dtype == DType::kFloat32 || dtype == DType::kBFloat16 || dtype == DType::kFloat16; }

// How many elements of a parameter lie in a row that blocks of codes do not cross.
int64_t row_of(const TensorView& param) {
  return param.ndim < 2 || param.numel == 0 ? 0 : param.numel / param.shape[0];
}

bool is_scales_of(const TensorView& scales, const TensorView& param) {
  if (param.numel == 0) return scales.dtype == DType::kUInt8 && scales.numel == 0;
  const int64_t row = row_of(param);
  return row > 0 && scales.dtype == DType::kUInt8 && scales.ndim == 2 && scales.shape[0] == param.shape[0] &&
         scales.shape[1] == divided_up(row, kBlock);
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

bool Known::still(PyObject* now, int64_t size) const {
  return object.ptr() == now && numel == size && buffer.data == data_pointer(now);
}

void Known::remember(PyObject* now, const TensorView& view) {
  *this = {py::reinterpret_borrow<py::object>(now), buffer_of(view), view.numel, {now, view.shape}};
}

bool Record::describe(const ParamGroup& group, const ParamObjects& objects, Device device, TensorDesc& desc) {
  TensorView param, grad;
  if (!read_tensor(objects.param, param) || !(param.device == device) || !is_float(param.dtype)) return false;
  desc.param = buffer_of(param);
  if (param.dtype != DType::kFloat32) desc.param.rounding = group.rounding;
  // A lazily negated parameter is a rarity, and looked for when a parameter is first met only.
  if (param_.object != objects.param && is_negated(objects.param)) return false;
  param_ = {objects.param, param.shape};
  if (!read_beside(param, objects.grad, grad) || is_negated(objects.grad)) return false;
  if (!is_float(grad.dtype) || !same_shape(grad, param)) return false;
  desc.grad = buffer_of(grad);
  grad_ = {objects.grad, grad.shape};
  desc.numel = param.numel;
  for (size_t k = 0; k < group.states.size(); ++k) {
    if (!describe_state(group.states[k], objects, k, param, desc)) return false;
  }
  const int second_moment = rules()[group.desc.rule].second_moment;
  if (second_moment >= 0 && desc.states[second_moment].dtype != DType::kFloat32) return false;
  if (group.is_factored() && !describe_factors(objects, param, desc)) return false;
  return describe_master(group, objects.master, param, desc) && describe_step(objects.step, param, desc);
}

bool Record::describe_state(const StateSpec& state, const ParamObjects& objects, size_t k, const TensorView& param,
                            TensorDesc& desc) {
  PyObject *object = objects.states[k], *scales = objects.scales[k];
  Known &known = states_[k], &known_scales = scales_[k];
  TensorView view;
  if (!known.still(object, param.numel)) {
    if (!read_beside(param, object, view) || !same_shape(view, param)) return false;
    if (scales == nullptr ? !is_float(view.dtype) : view.dtype != DType::kUInt8) return false;
    known.remember(object, view);
  }
  Buffer& buffer = desc.states[k] = known.buffer;
  if (buffer.dtype != DType::kFloat32) buffer.rounding = state.rounding;
  buffer.is_signed = state.is_signed;
  if (scales == nullptr) return !buffer.is_blockwise();
  if (!buffer.is_blockwise()) return false;
  const int64_t row = row_of(param);
  const int64_t blocks = row == 0 ? 0 : param.shape[0] * divided_up(row, kBlock);
  if (!known_scales.still(scales, blocks)) {
    if (!read_beside(param, scales, view) || !is_scales_of(view, param)) return false;
    known_scales.remember(scales, view);
  }
  buffer.scales = static_cast<uint8_t*>(known_scales.buffer.data);
  desc.row = row % kBlock == 0 ? param.numel : row;  // rows of whole blocks lie like one long row
  return true;
}

bool Record::describe_factors(const ParamObjects& objects, const TensorView& param, TensorDesc& desc) {
  for (int i = 0; i < 2; ++i) {
    PyObject* object = objects.factors[i];
    if (factors_[i].object && factors_[i].still(object, factors_[i].numel)) continue;
    TensorView view;
    if (!read_beside(param, object, view) || view.dtype != DType::kFloat32 || view.ndim < 1) return false;
    factors_[i].remember(object, view);
    (i == 0 ? row_count_ : column_count_) = view.shape[view.ndim - 1];
  }
  // As many matrices in the one as in the other, and in the parameter.
  const int64_t matrices = row_count_ == 0 || column_count_ == 0 ? 0 : param.numel / (row_count_ * column_count_);
  if (matrices * row_count_ * column_count_ != param.numel) return false;
  if (param.numel > 0 && (factors_[0].numel != matrices * row_count_ || factors_[1].numel != matrices * column_count_))
    return false;
  desc.factors = {static_cast<float*>(factors_[0].buffer.data), static_cast<float*>(factors_[1].buffer.data),
                  row_count_, column_count_};
  return true;
}

bool Record::describe_master(const ParamGroup& group, PyObject* object, const TensorView& param, TensorDesc& desc) {
  if (group.master == Master::kNone || param.dtype == DType::kFloat32) return true;
  if (object == nullptr) return false;
  if (param.dtype != DType::kBFloat16 && group.master != Master::kFloat32) return false;
  if (!master_.still(object, param.numel)) {
    TensorView view;
    if (!read_beside(param, object, view) || !same_shape(view, param)) return false;
    if (!is_master_dtype(group.master, view.dtype)) return false;
    master_.remember(object, view);
  }
  desc.master = master_.buffer;
  desc.master_format = group.master;
  return true;
}

bool Record::describe_step(PyObject* object, const TensorView& param, TensorDesc& desc) {
  if (!step_.still(object, 1)) {
    TensorView view;
    if (!read_beside(param, object, view) || view.dtype != DType::kFloat32 || view.numel != 1) return false;
    step_.remember(object, view);
  }
  desc.step = static_cast<float*>(step_.buffer.data);
  return true;
}

void Record::prefetch(size_t state_count) const {
  param_.prefetch();
  grad_.prefetch();
  step_.place.prefetch();
  for (size_t k = 0; k < state_count; ++k) states_[k].place.prefetch();
  // Without these objects there is nothing at their places.
  for (size_t k = 0; k < state_count && scales_[k].object; ++k) scales_[k].place.prefetch();
  if (master_.object) master_.place.prefetch();
  for (const Known& factor : factors_) {
    if (factor.object) factor.place.prefetch();
  }
}

}  // namespace fusedopt

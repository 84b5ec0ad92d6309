#include "python/read_tensor.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <iterator>

#include "python/versions.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

// The parts of the DLPack ABI, major version 1, that are used here (https://dmlc.github.io/dlpack).
namespace dlpack {

struct Version {
  uint32_t major, minor;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*tensor_from_py_object)(void* object, Tensor* out);
  void* current_work_stream;
};
constexpr int32_t kCpu = 1, kCuda = 2, kRocm = 10, kOneApi = 14;
constexpr uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4;

}  // namespace dlpack

struct TorchNames {
  std::vector<PyObject*> tensor_types;
  PyObject* dtypes = nullptr;  // {torch.dtype: int}
  const dlpack::ExchangeApi* exchange = nullptr;
  PyObject* is_neg = nullptr;
  PyObject* data_ptr = nullptr;
  // How far a tensor's sizes lie in its TensorImpl, by the number of dimensions; 0 where they lie elsewhere.
  std::array<ptrdiff_t, 6> sizes_offsets{};
  bool begins_with_implementation = false;  // what a tensor's Python object has after the fields of every object
};

// Lives as long as the process: torch's types do, too.
TorchNames& torch_names() {
  static TorchNames* names = new TorchNames;
  return *names;
}

bool is_contiguous(const dlpack::Tensor& tensor) {
  if (tensor.strides == nullptr) return true;
  int64_t expected = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    if (tensor.shape[i] == 0) return true;
    if (tensor.shape[i] != 1 && tensor.strides[i] != expected) return false;
    expected *= tensor.shape[i];
  }
  return true;
}

// A build of torch has one of CUDA and ROCm, and calls either "cuda".
Device known_as(Device device) { return {device.type == dlpack::kRocm ? dlpack::kCuda : device.type, device.id}; }

// Where tensors are read, by torch's names.
constexpr struct {
  const char* name;
  int32_t type;
} kDevices[] = {{"cpu", dlpack::kCpu}, {"cuda", dlpack::kCuda}, {"xpu", dlpack::kOneApi}};

bool is_readable(Device device) {
  return std::any_of(std::begin(kDevices), std::end(kDevices),
                     [&](const auto& each) { return each.type == device.type; });
}

bool read_through_exchange(PyObject* object, TensorView& view) {
  dlpack::Tensor tensor;
  if (torch_names().exchange->tensor_from_py_object(object, &tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  view.device = known_as(tensor.device);
  if (!is_readable(view.device)) return false;
  if (tensor.dtype.lanes != 1 || !is_contiguous(tensor)) return false;
  const auto is = [&](uint8_t code, int bits) { return tensor.dtype.code == code && tensor.dtype.bits == bits; };
  if (is(dlpack::kFloat, 32)) {
    view.dtype = DType::kFloat32;
  } else if (is(dlpack::kBfloat, 16)) {
    view.dtype = DType::kBFloat16;
  } else if (is(dlpack::kFloat, 16)) {
    view.dtype = DType::kFloat16;
  } else if (is(dlpack::kUInt, 8)) {
    view.dtype = DType::kUInt8;
  } else if (is(dlpack::kInt, 8)) {
    view.dtype = DType::kInt8;
  } else if (is(dlpack::kInt, 16)) {
    view.dtype = DType::kInt16;
  } else {
    return false;
  }
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  view.ndim = tensor.ndim;
  view.shape = tensor.shape;
  return true;
}

bool read_through_attributes(PyObject* object, TensorView& view) {
  TorchNames& names = torch_names();
  const py::handle tensor(object);
  try {
    const auto is = [&](const char* name) { return tensor.attr(name).cast<bool>(); };
    if (is("is_sparse")) return false;
    if (is("is_cpu")) {
      view.device = {dlpack::kCpu, 0};
    } else if (is("is_cuda") || is("is_xpu")) {
      view.device = {is("is_cuda") ? dlpack::kCuda : dlpack::kOneApi, tensor.attr("get_device")().cast<int32_t>()};
    } else {
      return false;
    }
    PyObject* dtype = PyDict_GetItem(names.dtypes, tensor.attr("dtype").ptr());
    if (dtype == nullptr || !tensor.attr("is_contiguous")().cast<bool>()) return false;
    view.dtype = static_cast<DType>(PyLong_AsLong(dtype));
    view.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
    view.copied_shape.clear();
    for (const py::handle size : tensor.attr("shape")) view.copied_shape.push_back(size.cast<int64_t>());
  } catch (py::error_already_set&) {  // another layout, a meta tensor: not one for the core
    return false;
  }
  view.ndim = static_cast<int>(view.copied_shape.size());
  view.shape = view.copied_shape.data();
  return true;
}

// The table of a major version that is known here; null if there is none.
const dlpack::ExchangeApi* exchange_of(const py::object& capsule) {
  if (capsule.is_none()) return nullptr;
  auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  while (api != nullptr && api->version.major > 1) api = api->previous;
  return api != nullptr && api->version.major == 1 ? api : nullptr;
}

// Small shapes lie within the TensorImpl, as torch is built; that is learned, not assumed.
std::array<ptrdiff_t, 6> learn_sizes_offsets(const std::vector<py::object>& probes) {
  std::array<ptrdiff_t, 6> offsets{};
  for (const py::object& probe : probes) {
    TensorView view;
    if (!read_tensor(probe.ptr(), view) || view.ndim >= static_cast<int>(offsets.size())) continue;
    const auto implementation = probe.attr("_cdata").cast<intptr_t>();
    const ptrdiff_t offset = reinterpret_cast<intptr_t>(view.shape) - implementation;
    constexpr ptrdiff_t kLargest = 512;  // of a TensorImpl
    if (offset > 0 && offset < kLargest) offsets[view.ndim] = offset;
  }
  return offsets;
}

const void* first_field_of(PyObject* object) {
  return *reinterpret_cast<void* const*>(reinterpret_cast<const char*>(object) + sizeof(PyObject));
}

// Objects have at::Tensor there, which is a pointer and no more; in some versions of torch they have something else.
bool learn_where_implementation_is(const std::vector<py::object>& probes) {
  return std::all_of(probes.begin(), probes.end(), [](const py::object& probe) {
    return reinterpret_cast<intptr_t>(first_field_of(probe.ptr())) == probe.attr("_cdata").cast<intptr_t>();
  });
}

}  // namespace

Device device_named(const std::string& type, int32_t index) {
  std::string names;
  for (const auto& each : kDevices) {
    if (type == each.name) return {each.type, index};
    names += (names.empty() ? "'" : ", '") + std::string(each.name) + "'";
  }
  throw py::value_error("device_type='" + type + "' is none whose tensors the core reads; use one of " + names);
}

void bind_torch(py::tuple tensor_types, py::dict dtypes, py::object is_neg, py::object data_ptr,
                py::object exchange_api, const std::vector<py::object>& probes, py::object increment_version) {
  TorchNames& names = torch_names();
  names.tensor_types.clear();
  for (const py::handle type : tensor_types) names.tensor_types.push_back(type.inc_ref().ptr());
  names.dtypes = dtypes.inc_ref().ptr();
  names.is_neg = is_neg.inc_ref().ptr();
  names.data_ptr = data_ptr.inc_ref().ptr();
  names.exchange = exchange_of(exchange_api);
  names.sizes_offsets = {};
  if (names.exchange != nullptr) names.sizes_offsets = learn_sizes_offsets(probes);
  names.begins_with_implementation = learn_where_implementation_is(probes);
  bind_versions(probes.at(0), std::move(increment_version));
}

bool reads_quickly() { return torch_names().exchange != nullptr; }

const void* implementation_of(const TensorView& view) {
  const auto& offsets = torch_names().sizes_offsets;
  const ptrdiff_t offset = view.ndim < static_cast<int>(offsets.size()) ? offsets[view.ndim] : 0;
  return offset == 0 ? nullptr : reinterpret_cast<const char*>(view.shape) - offset;
}

const void* implementation_of(PyObject* object) {
  return torch_names().begins_with_implementation ? first_field_of(object) : nullptr;
}

bool read_tensor(PyObject* object, TensorView& view) {
  const TorchNames& names = torch_names();
  bool is_plain = false;
  for (PyObject* type : names.tensor_types) {
    is_plain |= reinterpret_cast<PyObject*>(Py_TYPE(object)) == type;
  }
  if (!is_plain) return false;
  if (!(names.exchange ? read_through_exchange(object, view) : read_through_attributes(object, view))) return false;
  view.numel = 1;
  for (int i = 0; i < view.ndim; ++i) view.numel *= view.shape[i];
  if (view.data == nullptr && view.numel > 0) return false;  // freed, or a tensor of zeros that has no memory
  return reinterpret_cast<uintptr_t>(view.data) % size_of(view.dtype) == 0;
}

bool is_negated(PyObject* object) {
  PyObject* answer = PyObject_CallOneArg(torch_names().is_neg, object);
  if (answer == nullptr) PyErr_Clear();
  const bool plain = answer == Py_False;
  Py_XDECREF(answer);
  return !plain;
}

void* data_pointer(PyObject* object) {
  PyObject* answer = PyObject_CallOneArg(torch_names().data_ptr, object);
  if (answer == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  void* pointer = PyLong_AsVoidPtr(answer);
  Py_DECREF(answer);
  return pointer;
}

void Place::prefetch() const {
  const auto line = [](const void* address, int offset) {
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(address) + offset));
  };
  line(object, 0);
  // The fields that are read surround the sizes.
  line(sizes, -128);
  line(sizes, -64);
  line(sizes, 0);
  line(sizes, 64);
}

bool same_shape(const TensorView& a, const TensorView& b) {
  if (a.ndim != b.ndim) return false;
  for (int i = 0; i < a.ndim; ++i) {
    if (a.shape[i] != b.shape[i]) return false;
  }
  return true;
}

}  // namespace fusedopt

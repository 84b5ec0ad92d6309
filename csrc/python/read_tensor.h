// Reads where a torch tensor lies without linking torch: through the C table of the DLPack exchange
// protocol where torch offers it (a few nanoseconds a tensor), else by asking the Python object.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "core/tensors.h"

namespace fusedopt {

// A kind of device and which of them, as DLPack numbers them: 1 the CPU, 2 CUDA.
struct Device {
  int32_t type = 1, id = 0;

  bool operator==(const Device& other) const { return type == other.type && id == other.id; }
};

// The one that torch calls `type`, such as "cuda", of this index. Throws a ValueError if the core reads none there.
Device device_named(const std::string& type, int32_t index);

struct TensorView {
  void* data = nullptr;
  Device device;
  DType dtype = DType::kFloat32;
  int64_t numel = 0;
  int ndim = 0;
  const int64_t* shape = nullptr;     // the tensor's own, or copied_shape
  std::vector<int64_t> copied_shape;  // where the tensor had to be asked through Python
};

// The torch objects to tell tensors by. Called once, by fusedopt.backends.cpu.
//   tensor_types  the exact types that are read here: torch.Tensor and torch.nn.Parameter. A subclass
//                 may keep its numbers elsewhere (DTensor), so it is never read.
//   dtypes        {torch.dtype: DType}
//   is_neg, data_ptr  the methods of torch.Tensor
//   exchange_api  torch.Tensor.__dlpack_c_exchange_api__, or None
//   probes        plain CPU tensors of different numbers of dimensions, to learn from where torch keeps their sizes
//   increment_version  torch._C._increment_version, which counts that the tensors of a list were written
void bind_torch(pybind11::tuple tensor_types, pybind11::dict dtypes, pybind11::object is_neg, pybind11::object data_ptr,
                pybind11::object exchange_api, const std::vector<pybind11::object>& probes,
                pybind11::object increment_version);

// Fills `view` and returns true if `object` is a plain, contiguous tensor of a DType on the CPU or on a CUDA, ROCm or
// oneAPI device, aligned to its element size. Returns false for everything else, with no Python error set.
bool read_tensor(PyObject* object, TensorView& view);

// Whether it is a lazily negated view, as autograd makes of imaginary parts: its memory holds the
// negated values, which read_tensor does not see.
bool is_negated(PyObject* object);

// Whether that takes nanoseconds: torch offers the exchange table.
bool reads_quickly();

// tensor.data_ptr(): cheaper than read_tensor where that does not read quickly.
void* data_pointer(PyObject* object);

// Where torch keeps all about a tensor (its TensorImpl), of one that was read; null if that cannot be told.
const void* implementation_of(const TensorView& view);

// The same of a tensor of any class, by its Python object.
const void* implementation_of(PyObject* object);

// Where a tensor's Python object and its sizes lay when it was read: where, most likely, they lie in the
// next step. Only ever prefetched.
struct Place {
  const void* object = nullptr;
  const void* sizes = nullptr;  // inside torch's TensorImpl, mostly

  void prefetch() const;
};

bool same_shape(const TensorView& a, const TensorView& b);

}  // namespace fusedopt

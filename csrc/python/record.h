// What is remembered of a parameter's tensors from step to step, so that few have to be read again.
#pragma once

#include <pybind11/pybind11.h>

#include <array>

#include "core/tensors.h"
#include "python/param_group.h"
#include "python/param_objects.h"
#include "python/read_tensor.h"

namespace fusedopt {

// A tensor of a parameter's state as it was read some step ago.
struct Known {
  pybind11::object object;
  Buffer buffer;
  int64_t numel = 0;
  Place place;

  bool still(PyObject* now, int64_t size) const;  // the same object, of that size, at the same memory
  void remember(PyObject* now, const TensorView& view);
};

// The parameter at one position of a param group.
class Record {
 public:
  // Reads what is new of a parameter's tensors, and fills what `desc` says of them. Returns false if the core cannot
  // step them as they lie in the memory of a device.
  bool describe(const ParamGroup& group, const ParamObjects& objects, Device device, TensorDesc& desc);

  // Asks for the memory of the Python objects that were read last time, of so many states.
  void prefetch(size_t state_count) const;

 private:
  bool describe_state(const StateSpec& state, const ParamObjects& objects, size_t k, const TensorView& param,
                      TensorDesc& desc);
  bool describe_factors(const ParamObjects& objects, const TensorView& param, TensorDesc& desc);
  bool describe_master(const ParamGroup& group, PyObject* object, const TensorView& param, TensorDesc& desc);
  bool describe_step(PyObject* object, const TensorView& param, TensorDesc& desc);

  Place param_, grad_;
  std::array<Known, kMaxStates> states_, scales_;
  Known master_, step_;
  std::array<Known, 2> factors_;              // rows, columns
  int64_t row_count_ = 0, column_count_ = 0;  // of one matrix, where there are factors
};

}  // namespace fusedopt

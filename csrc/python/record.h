// What is remembered of a parameter's tensors from step to step, so that few have to be read again.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <memory>

#include "core/tensors.h"
#include "python/param_group.h"
#include "python/param_objects.h"
#include "python/read_tensor.h"
#include "python/shard_objects.h"

namespace fusedopt {

// A tensor of a parameter's state. It is not kept alive: what an optimizer's state drops is freed at once.
class Known {
 public:
  // As read_tensor. Where that takes long, the same object at the same memory is taken for what it was.
  bool read(PyObject* object, TensorView& view);

  Place place;  // where it was read last

 private:
  struct Reading {
    pybind11::weakref object;
    TensorView view;
  };
  std::unique_ptr<Reading> last_;  // where reading takes long
};

// The parameter at one position of a param group.
class Record {
 public:
  // Reads what is new of a parameter's tensors, and fills what `desc` says of them. Returns false if the core cannot
  // step them as they lie in the memory of a device.
  bool describe(const ParamGroup& group, const ParamObjects& objects, Device device, TensorDesc& desc);

  // Asks for the memory of the Python objects that were read last time, of so many states.
  void prefetch(size_t state_count) const;

  // Of the parameter that was read last; null if unknown.
  const void* implementation() const { return implementation_; }

  // What is remembered of it as a DTensor.
  ShardRecord& shard() {
    if (!shard_) shard_ = std::make_unique<ShardRecord>();
    return *shard_;
  }

 private:
  bool describe_state(const StateSpec& state, const ParamObjects& objects, size_t k, const TensorView& param,
                      TensorDesc& desc);
  bool describe_factors(const ParamObjects& objects, const TensorView& param, TensorDesc& desc);
  bool describe_master(const ParamGroup& group, PyObject* object, const TensorView& param, TensorDesc& desc);
  bool describe_step(PyObject* object, const TensorView& param, TensorDesc& desc);

  Place param_, grad_;
  std::array<Known, kMaxStates> states_, scales_;
  Known master_, step_;
  std::array<Known, 2> factors_;  // rows, columns
  const void* implementation_ = nullptr;
  std::unique_ptr<ShardRecord> shard_;
};

}  // namespace fusedopt

// What is held here of DTensors, found anew in every step. Few attributes are read for each: a step of many small
// tensors waits for Python objects more than for anything else.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <vector>

#include "core/tensors.h"
#include "python/param_objects.h"

namespace fusedopt {

// Where the elements of a shard are in the global tensor (core/tensors.h).
struct GlobalPlace {
  int64_t first_index = 0, segment = 0, segment_stride = 0;
};

using Alive = std::vector<pybind11::object>;

// Called once, by fusedopt.backends, when there may be DTensors.
//   type      torch's class of them, of which subclasses are not looked into
//   place_of  of a DTensor's spec: a GlobalPlace's numbers and whether every rank has all of it, or None where it is no
//   regular place
void bind_shards(pybind11::object type, pybind11::object place_of);

bool is_dtensor(PyObject* object);

// What a DTensor holds here, borrowed from it; where torch makes an object of it, `alive` keeps that.
PyObject* local_of(PyObject* dtensor, Alive& alive);

// The DTensor at one position of a param group: what was found out about its specs, and where its objects lay.
class ShardRecord {
 public:
  // Looks where a parameter and its gradient are. False if the gradient lies elsewhere than the parameter does, or that
  // is no regular place.
  bool find(PyObject* param, PyObject* grad);

  // Where what was found is, and whether every rank has all of it: there is nothing to add up with others then.
  const GlobalPlace& place() const { return place_; }
  bool is_whole() const { return is_whole_; }

  // Of the parameter itself, not of what it holds here; null if unknown.
  const void* implementation() const { return implementations_[0]; }

  // Replaces the DTensors among a parameter's objects by what they hold here.
  void unwrap(ParamObjects& objects, Alive& alive);

  // Asks for the memory of the Python objects that were read last time.
  void prefetch() const;

 private:
  bool knows_spec(PyObject* spec);
  bool lies_like(PyObject* grad_spec);

  pybind11::object spec_, grad_spec_;  // kept, so that no other has their addresses
  bool is_regular_ = false, is_whole_ = false, is_alike_ = false;
  GlobalPlace place_;
  std::array<const void*, 2> implementations_{};  // the parameter's and its gradient's
  std::array<const void*, 3 + 2 * kMaxStates> read_{};
};

}  // namespace fusedopt

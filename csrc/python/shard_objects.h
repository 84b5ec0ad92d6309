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

// Called once, by fusedopt.backends, when there may be DTensors.
//   type      torch's class of them, of which subclasses are not looked into
//   place_of  of a DTensor's spec: a tuple that begins with a GlobalPlace's numbers, or None where it is no regular
//   place
void bind_shards(pybind11::object type, pybind11::object place_of);

bool is_dtensor(PyObject* object);

// The DTensor at one position of a param group: what was found out about its specs, and where its objects lay.
class ShardRecord {
 public:
  // Replaces the DTensors among a parameter's objects by what they hold here, which `alive` keeps alive. False if its
  // gradient lies elsewhere than the parameter does, or its place is no regular one.
  bool unwrap(ParamObjects& objects, std::vector<pybind11::object>& alive, GlobalPlace& place);

  // Asks for the memory of the Python objects that were read last time.
  void prefetch() const;

 private:
  bool knows_spec(const pybind11::object& spec);
  bool lies_like(const pybind11::object& grad_spec);

  pybind11::object spec_, grad_spec_;  // kept, so that no other has their addresses
  bool is_regular_ = false, is_alike_ = false;
  GlobalPlace place_;
  std::array<const void*, 3 + 2 * kMaxStates> read_{};
};

}  // namespace fusedopt

// Tells autograd which tensors kernels have written. It keeps a count for every tensor, of how often it was written,
// to refuse a backward pass that needs values which are gone. torch's own operators count; kernels must say it.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "python/read_tensor.h"

namespace fusedopt {

// Looks for torch's function that counts, in its library, and tries it on `probe`, a tensor. Where it is not found, or
// not what it was, `increment`, which takes a list of tensors, is called in its place. Called by bind_torch.
void bind_versions(pybind11::handle probe, pybind11::object increment);

// The tensors of one step.
class Versions {
 public:
  void clear();

  // Notes a tensor that is to be written, as it was read, and stays alive until then.
  void add(PyObject* object, const void* implementation);

  // They have been written.
  void count();

 private:
  std::vector<const void*> implementations_;
  pybind11::list others_;  // of which nobody knows where their implementation is
};

}  // namespace fusedopt

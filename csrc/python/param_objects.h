// The Python objects of a parameter, and how they are found in the optimizer's state.
#pragma once

#include <pybind11/pybind11.h>

#include <array>

#include "core/tensors.h"
#include "python/param_group.h"

namespace fusedopt {

// Borrowed. `scales[k]` is null where state k is dense, `master` where there is none.
struct ParamObjects {
  PyObject* param = nullptr;
  PyObject* grad = nullptr;
  std::array<PyObject*, kMaxStates> states{}, scales{};
  PyObject* master = nullptr;
  PyObject* step = nullptr;
  std::array<PyObject*, 2> factors{};

  // Finds all but the first two in a parameter's state, which may be null; false if something is missing.
  bool find(const ParamGroup& group, PyObject* held);
};

// Finds entries of optimizer.state. Asked for in the dict's own order, as a rule, they are found without
// hashing, which for a tensor is a call into Python.
class StateEntries {
 public:
  explicit StateEntries(PyObject* state) : state_(state) { advance(); }

  // A parameter's state, or null.
  PyObject* find(PyObject* param) {
    if (key_ != param) return search(param);
    PyObject* held = value_;
    advance();
    return held;
  }

 private:
  PyObject* search(PyObject* param);

  void advance() {
    if (!PyDict_Next(state_, &position_, &key_, &value_)) key_ = value_ = nullptr;
  }

  PyObject* state_;
  Py_ssize_t position_ = 0;
  PyObject* key_ = nullptr;
  PyObject* value_ = nullptr;
  bool searched_ = false;
};

}  // namespace fusedopt

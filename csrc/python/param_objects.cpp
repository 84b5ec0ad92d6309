#include "python/param_objects.h"

namespace py = pybind11;

namespace fusedopt {

bool ParamObjects::find(const ParamGroup& group, PyObject* held) {
  static PyObject* const kStep = PyUnicode_InternFromString("step");
  if (held == nullptr || !PyDict_CheckExact(held)) return false;
  step = PyDict_GetItem(held, kStep);
  if (step == nullptr) return false;
  for (size_t k = 0; k < group.states.size(); ++k) {
    const StateSpec& state = group.states[k];
    states[k] = PyDict_GetItem(held, state.key.ptr());
    scales[k] = nullptr;
    if (states[k] != nullptr) continue;
    states[k] = PyDict_GetItem(held, state.codes_key.ptr());
    scales[k] = PyDict_GetItem(held, state.scales_key.ptr());
    if (states[k] == nullptr || scales[k] == nullptr) return false;
  }
  for (size_t i = 0; group.is_factored() && i < 2; ++i) {
    factors[i] = PyDict_GetItem(held, group.factor_keys[i].ptr());
    if (factors[i] == nullptr) return false;
  }
  // A parameter of 32 bits has none; Record::describe asks for what a 16-bit one needs.
  master = group.master == Master::kNone ? nullptr : PyDict_GetItem(held, group.master_key.ptr());
  return true;
}

PyObject* StateEntries::search(PyObject* param) {
  PyObject* held = PyDict_GetItemWithError(state_, param);
  if (held == nullptr && PyErr_Occurred()) throw py::error_already_set();
  // From here on in order again, where a group begins in the middle of the dict.
  Py_ssize_t position = 0;
  PyObject* key;
  if (held != nullptr && !searched_) {
    searched_ = true;
    while (PyDict_Next(state_, &position, &key, nullptr)) {
      if (key == param) {
        position_ = position;
        advance();
        break;
      }
    }
  }
  return held;
}

}  // namespace fusedopt

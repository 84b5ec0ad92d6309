#include "python/shard_objects.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

struct Bound {
  py::object type, place_of;
};

// Lives as long as the process, as torch does.
Bound& bound() {
  static Bound* found = new Bound;
  return *found;
}

py::object attribute(PyObject* object, PyObject* name) {
  auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name));
  if (!found) throw py::error_already_set();
  return found;
}

py::object local_of(PyObject* dtensor) {
  static PyObject* const kLocal = PyUnicode_InternFromString("_local_tensor");
  return attribute(dtensor, kLocal);
}

py::object spec_of(PyObject* dtensor) {
  static PyObject* const kSpec = PyUnicode_InternFromString("_spec");
  return attribute(dtensor, kSpec);
}

}  // namespace

void bind_shards(py::object type, py::object place_of) { bound() = {std::move(type), std::move(place_of)}; }

bool is_dtensor(PyObject* object) {
  return object != nullptr && reinterpret_cast<PyObject*>(Py_TYPE(object)) == bound().type.ptr();
}

bool ShardRecord::knows_spec(const py::object& spec) {
  if (spec.is(spec_)) return is_regular_;
  const py::object place = bound().place_of(spec);
  is_regular_ = !place.is_none();
  if (is_regular_) {
    const py::tuple numbers = place;
    place_ = {numbers[0].cast<int64_t>(), numbers[1].cast<int64_t>(), numbers[2].cast<int64_t>()};
  }
  spec_ = spec;
  grad_spec_ = py::object();
  return is_regular_;
}

bool ShardRecord::lies_like(const py::object& grad_spec) {
  if (grad_spec.is(spec_)) return true;
  if (!grad_spec_ || !grad_spec.is(grad_spec_)) {
    is_alike_ = grad_spec.attr("placements").equal(spec_.attr("placements")) &&
                grad_spec.attr("mesh").equal(spec_.attr("mesh"));
    grad_spec_ = grad_spec;
  }
  return is_alike_;
}

bool ShardRecord::unwrap(ParamObjects& objects, std::vector<py::object>& alive, GlobalPlace& place) {
  if (!is_dtensor(objects.grad) || !knows_spec(spec_of(objects.param)) || !lies_like(spec_of(objects.grad))) {
    return false;
  }
  size_t count = 0;
  const auto unwrapped = [&](PyObject*& object) {
    if (!is_dtensor(object)) return;
    if (count < read_.size()) read_[count++] = object;
    alive.push_back(local_of(object));
    object = alive.back().ptr();
  };
  unwrapped(objects.param);
  unwrapped(objects.grad);
  for (size_t k = 0; k < objects.states.size(); ++k) {
    unwrapped(objects.states[k]);
    unwrapped(objects.scales[k]);
  }
  unwrapped(objects.master);
  unwrapped(objects.step);
  for (PyObject*& factor : objects.factors) unwrapped(factor);
  place = place_;
  return true;
}

void ShardRecord::prefetch() const {
  for (const void* object : read_) {
    if (object == nullptr) break;
    __builtin_prefetch(object);
    __builtin_prefetch(static_cast<const char*>(object) + 64);
  }
}

}  // namespace fusedopt

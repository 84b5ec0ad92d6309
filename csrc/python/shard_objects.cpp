#include "python/shard_objects.h"

#include <structmember.h>

#include "python/read_tensor.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

// An attribute of DTensors. Where it is a slot, it is read from the object itself: asking for an attribute takes
// longer, and counting a reference writes to what else would only be pointed to.
struct Attribute {
  PyObject* name = nullptr;
  Py_ssize_t offset = 0;  // 0 if it is no slot

  Attribute() = default;
  Attribute(const py::object& type, const char* text) : name(PyUnicode_InternFromString(text)) {
    const auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(type.ptr(), name));
    if (!found) PyErr_Clear();  // the class has none, its objects do
    if (!found || Py_TYPE(found.ptr()) != &PyMemberDescr_Type) return;
    const auto* slot = reinterpret_cast<PyMemberDescrObject*>(found.ptr());
    if (slot->d_member->type == T_OBJECT_EX) offset = slot->d_member->offset;
  }

  // Borrowed from the DTensor, or from `alive`.
  PyObject* of(PyObject* dtensor, Alive& alive) const {
    if (offset != 0) {
      PyObject* held = *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(dtensor) + offset);
      if (held != nullptr) return held;
    }
    auto made = py::reinterpret_steal<py::object>(PyObject_GetAttr(dtensor, name));
    if (!made) throw py::error_already_set();
    alive.push_back(std::move(made));
    return alive.back().ptr();
  }
};

struct Bound {
  py::object type, place_of;
  Attribute local, spec;
};

// Lives as long as the process, as torch does.
Bound& bound() {
  static Bound* found = new Bound;
  return *found;
}

}  // namespace

void bind_shards(py::object type, py::object place_of) {
  const Attribute local(type, "_local_tensor"), spec(type, "_spec");
  bound() = {std::move(type), std::move(place_of), local, spec};
}

bool is_dtensor(PyObject* object) {
  return object != nullptr && reinterpret_cast<PyObject*>(Py_TYPE(object)) == bound().type.ptr();
}

PyObject* local_of(PyObject* dtensor, Alive& alive) { return bound().local.of(dtensor, alive); }

bool ShardRecord::knows_spec(PyObject* found) {
  if (found == spec_.ptr()) return is_regular_;
  const auto spec = py::reinterpret_borrow<py::object>(found);
  const py::object place = bound().place_of(spec);
  is_regular_ = !place.is_none();
  if (is_regular_) {
    const py::tuple numbers = place;
    place_ = {numbers[0].cast<int64_t>(), numbers[1].cast<int64_t>(), numbers[2].cast<int64_t>()};
    is_whole_ = numbers[3].cast<bool>();
  }
  spec_ = spec;
  grad_spec_ = py::object();
  return is_regular_;
}

bool ShardRecord::lies_like(PyObject* found) {
  if (found == spec_.ptr()) return true;
  if (found != grad_spec_.ptr()) {
    const auto grad_spec = py::reinterpret_borrow<py::object>(found);
    is_alike_ = grad_spec.attr("placements").equal(spec_.attr("placements")) &&
                grad_spec.attr("mesh").equal(spec_.attr("mesh"));
    grad_spec_ = grad_spec;
  }
  return is_alike_;
}

bool ShardRecord::find(PyObject* param, PyObject* grad) {
  if (!is_dtensor(grad)) return false;
  implementations_ = {implementation_of(param), implementation_of(grad)};
  const Attribute& spec = bound().spec;
  Alive alive;
  return knows_spec(spec.of(param, alive)) && lies_like(spec.of(grad, alive));
}

void ShardRecord::unwrap(ParamObjects& objects, Alive& alive) {
  size_t count = 0;
  const auto unwrapped = [&](PyObject*& object) {
    if (!is_dtensor(object)) return;
    if (count < read_.size()) read_[count++] = object;
    object = local_of(object, alive);
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
}

void ShardRecord::prefetch() const {
  const auto ask = [](const void* memory) {
    __builtin_prefetch(memory);
    __builtin_prefetch(static_cast<const char*>(memory) + 64);
  };
  for (const void* object : read_) {
    if (object == nullptr) break;
    ask(object);
  }
  for (const void* implementation : implementations_) {  // where a parameter's gradient and its version are found
    if (implementation != nullptr) ask(implementation);
  }
}

}  // namespace fusedopt

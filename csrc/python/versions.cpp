#include "python/versions.h"

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace py = pybind11;

namespace fusedopt {
namespace {

// torch::autograd::impl::bump_version(const at::Tensor&). A tensor is a pointer to its implementation, no more.
using Bump = void (*)(const void* const& implementation);

struct Functions {
  Bump bump = nullptr;
  py::object increment;
};

// Lives as long as the process, as torch does.
Functions& functions() {
  static Functions* found = new Functions;
  return *found;
}

Bump find_bump() {
#if defined(__linux__)
  // Loaded already, by torch: this only finds it.
  void* library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return nullptr;
  void* found = dlsym(library, "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE");
  dlclose(library);
  return reinterpret_cast<Bump>(found);
#else
  return nullptr;
#endif
}

}  // namespace

void bind_versions(py::handle probe, py::object increment) {
  Functions& found = functions();
  found = {nullptr, std::move(increment)};
  const Bump bump = find_bump();
  TensorView view;
  if (bump == nullptr || !read_tensor(probe.ptr(), view)) return;
  const void* implementation = implementation_of(view);
  if (implementation == nullptr) return;
  const auto version = [&] { return probe.attr("_version").cast<int64_t>(); };
  const int64_t before = version();
  bump(implementation);
  if (version() == before + 1) found.bump = bump;
}

void Versions::clear() {
  implementations_.clear();
  if (!others_.empty()) others_ = py::list();
}

void Versions::add(PyObject* object, const void* implementation) {
  if (implementation != nullptr && functions().bump != nullptr) {
    implementations_.push_back(implementation);
  } else {
    others_.append(py::handle(object));
  }
}

void Versions::count() {
  const Functions& found = functions();
  for (const void* implementation : implementations_) {
    try {
      found.bump(implementation);
    } catch (...) {  // a tensor that was made in inference mode, of which nothing is counted
    }
  }
  if (!others_.empty()) found.increment(others_);
}

}  // namespace fusedopt

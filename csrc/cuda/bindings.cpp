// fusedopt._cuda: registration only. Streams, tensors and a step's list (fusedopt._core's TensorTable.batch) come as
// addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <exception>
#include <optional>
#include <string>

#include "cuda/launch.h"
#if defined(CUDA_ON_CPU)
#include "queues_python.h"
#endif

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

using fusedopt::cuda::Batch;
using fusedopt::cuda::DeviceLr;
using fusedopt::cuda::Scaling;

Batch batch_at(uintptr_t address) {
  const auto& lists = *reinterpret_cast<const fusedopt::StepLists*>(address);
  return {lists.tensors, lists.groups};
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// The latest CUDA that the driver supports, as CUDART_VERSION has it; 0 if there is no driver.
int driver_version() {
  int version = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess) version = 0;
  cudaGetLastError();
  return version;
}

// Squares a number on the device by a kernel with as many parameters as any of them, and waits for it. Returns what
// went wrong, and leaves no error behind; empty if nothing did.
std::string trial(const float* number, double* square, cudaStream_t stream) {
  fusedopt::StepLists lists;
  lists.tensors.resize(1);
  lists.tensors[0].grad.data = const_cast<float*>(number);
  lists.tensors[0].numel = 1;
  std::string said;
  try {
    fusedopt::cuda::square_sums({lists.tensors, lists.groups}, square, stream);
    const cudaError_t error = cudaStreamSynchronize(stream);
    if (error != cudaSuccess) said = std::string("CUDA: ") + cudaGetErrorString(error);
  } catch (const std::exception& error) {
    said = error.what();
  }
  cudaGetLastError();
  return said;
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "The CUDA kernels of fusedopt. It does not link torch.";
  // Both modules see the same lists: they must come from the same build.
  module.attr("layout") = fusedopt::layout_of_lists();
#if defined(CUDART_VERSION)
  module.attr("toolkit") = CUDART_VERSION;
#else
  module.attr("toolkit") = py::none();
#endif
#if defined(FUSEDOPT_ARCHITECTURES)
  module.attr("architectures") = FUSEDOPT_ARCHITECTURES;
#else
  module.attr("architectures") = "";
#endif

#if defined(CUDA_ON_CPU)
  module.def("set_order", &cuda_on_cpu::set_order, "seed"_a);
  cuda_on_cpu::bind_queues(module);
#endif

  module.def("driver_version", &driver_version);
  module.def(
      "trial",
      [](uintptr_t number, uintptr_t square, uintptr_t stream) {
        const py::gil_scoped_release released;
        return trial(pointer<float>(number), pointer<double>(square), reinterpret_cast<cudaStream_t>(stream));
      },
      py::kw_only(), "number"_a, "square"_a, "stream"_a);

  module.def(
      "workspace_bytes",
      [](uintptr_t batch, bool clips, bool sums_updates) {
        return fusedopt::cuda::workspace_bytes(batch_at(batch), clips, sums_updates);
      },
      py::kw_only(), "batch"_a, "clips"_a, "sums_updates"_a);
  module.def(
      "step",
      [](uintptr_t batch, const std::vector<std::pair<uintptr_t, bool>>& lrs, uintptr_t grad_scale, uintptr_t found_inf,
         std::optional<double> max_grad_norm, std::optional<double> skip_step_above, uintptr_t grad_norm,
         bool sums_updates, uintptr_t update_sums, uintptr_t workspace, uintptr_t stream) {
        std::vector<DeviceLr> rates;
        for (const auto& [data, is_double] : lrs) rates.push_back({pointer<void>(data), is_double});
        Scaling scaling;
        scaling.grad_scale = pointer<float>(grad_scale);
        scaling.found_inf = pointer<float>(found_inf);
        scaling.max_grad_norm = max_grad_norm.value_or(0.0);
        scaling.skip_above = skip_step_above.value_or(scaling.skip_above);
        scaling.grad_norm = pointer<float>(grad_norm);
        const py::gil_scoped_release released;
        fusedopt::cuda::step(batch_at(batch), rates, scaling, max_grad_norm.has_value(), sums_updates,
                             pointer<double>(update_sums), pointer<void>(workspace),
                             reinterpret_cast<cudaStream_t>(stream));
      },
      py::kw_only(), "batch"_a, "lrs"_a, "grad_scale"_a, "found_inf"_a, "max_grad_norm"_a, "skip_step_above"_a,
      "grad_norm"_a, "sums_updates"_a, "update_sums"_a, "workspace"_a, "stream"_a);
  module.def(
      "count_update_sums", [](uintptr_t batch) { return fusedopt::cuda::count_update_sums(batch_at(batch)); },
      py::kw_only(), "batch"_a);
  module.def(
      "count_square_sums", [](uintptr_t batch) { return fusedopt::cuda::count_square_sums(batch_at(batch)); },
      py::kw_only(), "batch"_a);
  module.def(
      "square_sums",
      [](uintptr_t batch, uintptr_t sums, uintptr_t stream) {
        const py::gil_scoped_release released;
        fusedopt::cuda::square_sums(batch_at(batch), pointer<double>(sums), reinterpret_cast<cudaStream_t>(stream));
      },
      py::kw_only(), "batch"_a, "sums"_a, "stream"_a);
}

// The step kernels of two rules, compiled by test_paths.py for architectures that the module was not built for.
#include "cuda/launch_step.cuh"

namespace fusedopt::cuda {

extern const StepFn kUsual[];
const StepFn kUsual[] = {step_fn<AdamW, false>(), step_fn<AdamW, true>(), step_fn<Lion, false>(),
                         step_fn<Lion, true>()};

}  // namespace fusedopt::cuda

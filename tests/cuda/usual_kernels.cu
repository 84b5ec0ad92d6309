// The step kernels of two rules, compiled by test_paths.py for architectures that the module was not built for.
#include "cuda/launch_step.cuh"

namespace fusedopt::cuda {

extern const StepFn kUsual[];
const StepFn kUsual[] = {launch_steps<AdamW, false>, launch_steps<AdamW, true>, launch_steps<Lion, false>,
                         launch_steps<Lion, true>};

}  // namespace fusedopt::cuda

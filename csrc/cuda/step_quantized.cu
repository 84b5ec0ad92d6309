#include "cuda/launch_step.cuh"

namespace fusedopt::cuda {

#define FUSEDOPT_STEPS(name, type) step_fn<type, true>(),
const StepFn kStepQuantized[] = {FUSEDOPT_RULES(FUSEDOPT_STEPS)};

}  // namespace fusedopt::cuda

#include "cuda/launch_step.cuh"

namespace fusedopt::cuda {

#define FUSEDOPT_STEPS(name, type) step_fn<type, false>(),
const StepFn kStepDense[] = {FUSEDOPT_RULES(FUSEDOPT_STEPS)};

}  // namespace fusedopt::cuda

#include "cuda/launch_step.cuh"

namespace fusedopt::cuda {

#define FUSEDOPT_STEPS(name, type) launch_steps<type, false>,
const StepFn kStepDense[] = {FUSEDOPT_RULES(FUSEDOPT_STEPS)};

}  // namespace fusedopt::cuda

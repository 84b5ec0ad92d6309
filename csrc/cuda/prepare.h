// What gradients are multiplied by, on the device.
#pragma once

#include <limits>

namespace fusedopt::cuda {

// Added to the gradient norm before dividing by it, as torch.nn.utils.clip_grad_norm_ does.
constexpr double kClipEps = 1e-6;

// What gradients of all tensors are multiplied by. Pointers may be null.
struct Scaling {
  const float* grad_scale = nullptr;   // gradients are this many times too large
  const float* found_inf = nullptr;    // not 0: the step is skipped
  const double* square_sum = nullptr;  // of all gradients, for clipping to
  double max_grad_norm = 0.0;
  double skip_above = std::numeric_limits<double>::infinity();  // a norm; the step is skipped if it is NaN, too
  float* grad_norm = nullptr;                                   // takes the norm found
};

}  // namespace fusedopt::cuda

// Schedule-free SGD and Adam: Defazio et al., "The Road Less Scheduled", arXiv:2405.15682. The rectified form takes its
// lr from RAdam: Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", arXiv:1908.03265.
//
// The parameter is y, where gradients are taken; x, the average of z, is what is evaluated, and y = (1 - b1) z + b1 x.
//
//   z  = p                              in the first step, whatever it was
//   v  = b2 v + ((1 - b2) g) g          exp_avg_sq (kAdaptive)
//   n  = g / (sqrt(v) * (1/sqrt(1 - b2^t)) + eps)     kAdaptive, unless adaptive is 0; else n = g
//   n  = n + wd p
//   p  = p + c (z - p) + lr (b1 (1 - c) - 1) n
//   z  = z - lr n
//
// in this order, every operation rounded to fp32; lr (b1 (1 - c) - 1) and 1/sqrt(1 - b2^t) in double, rounded once. lr
// is that of the step, warmup included, and c the step's weight in the average, both from what the param group has
// seen.
#pragma once

#include "rules/rule.h"

namespace fusedopt {
namespace {

template <bool kAdaptive>
struct ScheduleFree {
  static constexpr int kStates = kAdaptive ? 2 : 1;
  static constexpr const char* kStateNames[] = {"z", "exp_avg_sq"};
  static constexpr bool kSigned[] = {true, false};
  static constexpr int kRooted = kAdaptive ? 1 : -1;

  struct Config {
    double lr, beta1, beta2, eps, weight_decay, average, adaptive;
  };
  static constexpr ConfigField kFields[] = {
      {"lr", offsetof(Config, lr)},
      {"beta1", offsetof(Config, beta1)},
      {"beta2", offsetof(Config, beta2)},
      {"eps", offsetof(Config, eps)},
      {"weight_decay", offsetof(Config, weight_decay)},
      {"average", offsetof(Config, average)},
      {"adaptive", offsetof(Config, adaptive)},
  };

  struct Hyper {
    float first, lr, step_size, average, weight_decay;
    float beta2, one_minus_beta2, inverse_sqrt_bias2, eps, adaptive;
  };

  static FUSEDOPT_FN Hyper derive(const Config& c, int64_t step) {
    return {
        step == 1 ? 1.0f : 0.0f,
        static_cast<float>(c.lr),
        static_cast<float>(c.lr * (c.beta1 * (1.0 - c.average) - 1.0)),
        static_cast<float>(c.average),
        static_cast<float>(c.weight_decay),
        static_cast<float>(c.beta2),
        static_cast<float>(1.0 - c.beta2),
        static_cast<float>(1.0 / root(1.0 - power(c.beta2, step))),
        static_cast<float>(c.eps),
        static_cast<float>(c.adaptive),
    };
  }

  template <class F>
  static FUSEDOPT_FN F update(F& p, F g, F* s, const Hyper& h) {
    F& z = s[0];
    z = h.first != 0.0f ? p : z;
    F rooted{};
    if constexpr (kAdaptive) {
      s[1] = h.beta2 * s[1] + (h.one_minus_beta2 * g) * g;
      rooted = root(s[1]);
      g = h.adaptive != 0.0f ? g / (rooted * h.inverse_sqrt_bias2 + h.eps) : g;
    }
    g = h.weight_decay != 0.0f ? g + h.weight_decay * p : g;
    p = (p + h.average * (z - p)) + h.step_size * g;
    z = z - h.lr * g;
    return rooted;
  }
};

using ScheduleFreeSGD = ScheduleFree<false>;
using ScheduleFreeAdam = ScheduleFree<true>;

}  // namespace
}  // namespace fusedopt

// AdEMAMix: Pagliardini, Ablin & Grangier, "The AdEMAMix Optimizer: Better, Faster, Older",
// arXiv:2409.03137.
//
//   p  = p (1 - lr wd)
//   m  = b1 m + (1 - b1) g              exp_avg
//   m' = b3(t) m' + (1 - b3(t)) g       exp_avg_slow, not bias-corrected
//   v  = b2 v + ((1 - b2) g) g          exp_avg_sq
//   p  = p - lr ((m * (1/(1 - b1^t)) + alpha(t) m') / (sqrt(v) * (1/sqrt(1 - b2^t)) + eps))
//
// in this order, every operation rounded to fp32; both reciprocals in double, rounded once. alpha(t) grows linearly
// until t_alpha; b3(t) grows from b1 until t_beta3 such that the half-life of m' grows linearly (section 3 of the
// paper).
#pragma once

#include <algorithm>
#include <cmath>

#include "rules/rule.h"

namespace fusedopt {
namespace {

struct AdEMAMix {
  static constexpr int kStates = 3;
  static constexpr const char* kStateNames[] = {"exp_avg", "exp_avg_slow", "exp_avg_sq"};
  static constexpr bool kSigned[] = {true, true, false};
  static constexpr int kRooted = 2;

  struct Config {
    double lr, beta1, beta2, beta3, alpha, t_alpha, t_beta3, eps, weight_decay;  // t_... = 0: no schedule
  };
  static constexpr ConfigField kFields[] = {
      {"lr", offsetof(Config, lr)},
      {"beta1", offsetof(Config, beta1)},
      {"beta2", offsetof(Config, beta2)},
      {"beta3", offsetof(Config, beta3)},
      {"alpha", offsetof(Config, alpha)},
      {"t_alpha", offsetof(Config, t_alpha)},
      {"t_beta3", offsetof(Config, t_beta3)},
      {"eps", offsetof(Config, eps)},
      {"weight_decay", offsetof(Config, weight_decay)},
  };

  struct Hyper {
    float lr, decay;
    float beta1, one_minus_beta1;
    float beta2, one_minus_beta2;
    float beta3, one_minus_beta3;
    float alpha, inverse_bias1, inverse_sqrt_bias2, eps;
  };

  static FUSEDOPT_FN double alpha_at(const Config& c, int64_t step) {
    return c.t_alpha > 0.0 ? std::min(c.alpha, c.alpha * static_cast<double>(step) / c.t_alpha) : c.alpha;
  }

  static FUSEDOPT_FN double beta3_at(const Config& c, int64_t step) {
    const double part = c.t_beta3 > 0.0 ? static_cast<double>(step) / c.t_beta3 : 1.0;
    if (part >= 1.0 || c.beta3 <= c.beta1) return c.beta3;
    const double log3 = std::log(c.beta3);
    if (c.beta1 == 0.0) return std::exp(log3 / part);  // the limit of what follows
    const double log1 = std::log(c.beta1);
    return std::min(c.beta3, std::exp(log1 * log3 / ((1.0 - part) * log3 + part * log1)));
  }

  static FUSEDOPT_FN Hyper derive(const Config& c, int64_t step) {
    const double beta3 = beta3_at(c, step);
    return {
        static_cast<float>(c.lr),
        static_cast<float>(1.0 - c.lr * c.weight_decay),
        static_cast<float>(c.beta1),
        static_cast<float>(1.0 - c.beta1),
        static_cast<float>(c.beta2),
        static_cast<float>(1.0 - c.beta2),
        static_cast<float>(beta3),
        static_cast<float>(1.0 - beta3),
        static_cast<float>(alpha_at(c, step)),
        static_cast<float>(1.0 / (1.0 - power(c.beta1, step))),
        static_cast<float>(1.0 / root(1.0 - power(c.beta2, step))),
        static_cast<float>(c.eps),
    };
  }

  template <class F>
  static FUSEDOPT_FN F update(F& p, F g, F* s, const Hyper& h) {
    F& exp_avg = s[0];
    F& exp_avg_slow = s[1];
    F& exp_avg_sq = s[2];
    exp_avg = h.beta1 * exp_avg + h.one_minus_beta1 * g;
    exp_avg_slow = h.beta3 * exp_avg_slow + h.one_minus_beta3 * g;
    exp_avg_sq = h.beta2 * exp_avg_sq + (h.one_minus_beta2 * g) * g;
    const F rooted = root(exp_avg_sq);
    const F mixed = exp_avg * h.inverse_bias1 + h.alpha * exp_avg_slow;
    p = p * h.decay - h.lr * (mixed / (rooted * h.inverse_sqrt_bias2 + h.eps));
    return rooted;
  }
};

}  // namespace
}  // namespace fusedopt

// Adam and AdamW.
//
//   Adam:   Kingma & Ba, "Adam: A Method for Stochastic Optimization", arXiv:1412.6980
//   AdamW:  Loshchilov & Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101
//   AMSGrad: Reddi, Kale & Kumar, "On the Convergence of Adam and Beyond", arXiv:1904.09237
//
//   g  = g + wd p                       Adam's L2 decay (kL2), else
//   p  = p (1 - lr wd)                  AdamW's decoupled decay
//   m  = b1 m + (1 - b1) g              exp_avg
//   v  = b2 v + ((1 - b2) g) g          exp_avg_sq
//   u  = v, or max(u, v)                max_exp_avg_sq (kAmsgrad)
//   p  = p - lr/(1 - b1^t) * (m / (sqrt(u) * (1/sqrt(1 - b2^t)) + eps))
//
// in this order, every operation rounded to fp32; lr/(1 - b1^t) and 1/sqrt(1 - b2^t) in double, rounded once.
#pragma once

#include "rules/rule.h"

namespace fusedopt {
namespace {

template <bool kL2, bool kAmsgrad>
struct Adam {
  static constexpr int kStates = kAmsgrad ? 3 : 2;
  static constexpr const char* kStateNames[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
  static constexpr bool kSigned[] = {true, false, false};

  static constexpr int kRooted = kAmsgrad ? -1 : 1;

  struct Config {
    double lr, beta1, beta2, eps, weight_decay;
  };
  static constexpr ConfigField kFields[] = {
      {"lr", offsetof(Config, lr)},
      {"beta1", offsetof(Config, beta1)},
      {"beta2", offsetof(Config, beta2)},
      {"eps", offsetof(Config, eps)},
      {"weight_decay", offsetof(Config, weight_decay)},
  };

  struct Hyper {
    float weight_decay, decay;
    float beta1, one_minus_beta1;
    float beta2, one_minus_beta2;
    float step_size, inverse_sqrt_bias2, eps;
  };

  static FUSEDOPT_FN Hyper derive(const Config& c, int64_t step) {
    const double bias1 = 1.0 - power(c.beta1, step);
    const double bias2 = 1.0 - power(c.beta2, step);
    return {
        static_cast<float>(c.weight_decay), static_cast<float>(1.0 - c.lr * c.weight_decay),
        static_cast<float>(c.beta1),        static_cast<float>(1.0 - c.beta1),
        static_cast<float>(c.beta2),        static_cast<float>(1.0 - c.beta2),
        static_cast<float>(c.lr / bias1),   static_cast<float>(1.0 / root(bias2)),
        static_cast<float>(c.eps),
    };
  }

  template <class F>
  static FUSEDOPT_FN F update(F& p, F g, F* s, const Hyper& h) {
    if constexpr (kL2) {
      g = g + h.weight_decay * p;
    } else {
      p = p * h.decay;
    }
    F& exp_avg = s[0];
    F& exp_avg_sq = s[1];
    exp_avg = h.beta1 * exp_avg + h.one_minus_beta1 * g;
    exp_avg_sq = h.beta2 * exp_avg_sq + (h.one_minus_beta2 * g) * g;
    F second = exp_avg_sq;
    if constexpr (kAmsgrad) second = s[2] = maximum(s[2], exp_avg_sq);
    const F rooted = root(second);
    p = p - h.step_size * (exp_avg / (rooted * h.inverse_sqrt_bias2 + h.eps));
    return rooted;
  }
};

using AdamW = Adam<false, false>;
using AdamWAmsgrad = Adam<false, true>;
using AdamL2 = Adam<true, false>;
using AdamL2Amsgrad = Adam<true, true>;

}  // namespace
}  // namespace fusedopt

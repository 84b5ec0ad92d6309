// Lion: Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675.
//
//   p = p (1 - lr wd)
//   u = sign(b1 m + (1 - b1) g)         0 where that is 0
//   m = b2 m + (1 - b2) g               exp_avg
//   p = p - lr u
//
// in this order, every operation rounded to fp32.
#pragma once

#include "rules/rule.h"

namespace fusedopt {
namespace {

struct Lion {
  static constexpr int kStates = 1;
  static constexpr const char* kStateNames[] = {"exp_avg"};
  static constexpr bool kSigned[] = {true};
  static constexpr int kRooted = -1;

  struct Config {
    double lr, beta1, beta2, weight_decay;
  };
  static constexpr ConfigField kFields[] = {
      {"lr", offsetof(Config, lr)},
      {"beta1", offsetof(Config, beta1)},
      {"beta2", offsetof(Config, beta2)},
      {"weight_decay", offsetof(Config, weight_decay)},
  };

  struct Hyper {
    float lr, decay;
    float beta1, one_minus_beta1;
    float beta2, one_minus_beta2;
  };

  static FUSEDOPT_FN Hyper derive(const Config& c, int64_t) {
    return {
        static_cast<float>(c.lr),    static_cast<float>(1.0 - c.lr * c.weight_decay),
        static_cast<float>(c.beta1), static_cast<float>(1.0 - c.beta1),
        static_cast<float>(c.beta2), static_cast<float>(1.0 - c.beta2),
    };
  }

  template <class F>
  static FUSEDOPT_FN F update(F& p, F g, F* s, const Hyper& h) {
    F& exp_avg = s[0];
    const F direction = sign(h.beta1 * exp_avg + h.one_minus_beta1 * g);
    exp_avg = h.beta2 * exp_avg + h.one_minus_beta2 * g;
    p = p * h.decay - h.lr * direction;
    return F{};
  }
};

}  // namespace
}  // namespace fusedopt

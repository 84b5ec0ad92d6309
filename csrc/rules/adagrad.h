// Adagrad: Duchi, Hazan & Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic
// Optimization", JMLR 12 (2011), 2121-2159.
//
//   g = g + wd p                        where wd is not 0
//   s = s + g g                         sum
//   p = p - lr/(1 + (t - 1) lr_decay) * (g / (sqrt(s) + eps))
//
// in this order, every operation rounded to fp32.
#pragma once

#include "rules/rule.h"

namespace fusedopt {
namespace {

struct Adagrad {
  static constexpr int kStates = 1;
  static constexpr const char* kStateNames[] = {"sum"};
  static constexpr bool kSigned[] = {false};
  static constexpr int kRooted = 0;

  struct Config {
    double lr, lr_decay, eps, weight_decay;
  };
  static constexpr ConfigField kFields[] = {
      {"lr", offsetof(Config, lr)},
      {"lr_decay", offsetof(Config, lr_decay)},
      {"eps", offsetof(Config, eps)},
      {"weight_decay", offsetof(Config, weight_decay)},
  };

  struct Hyper {
    float lr, eps, weight_decay;
  };

  static FUSEDOPT_FN Hyper derive(const Config& c, int64_t step) {
    return {
        static_cast<float>(c.lr / (1.0 + static_cast<double>(step - 1) * c.lr_decay)),
        static_cast<float>(c.eps),
        static_cast<float>(c.weight_decay),
    };
  }

  template <class F>
  static FUSEDOPT_FN F update(F& p, F g, F* s, const Hyper& h) {
    g = h.weight_decay != 0.0f ? g + h.weight_decay * p : g;
    s[0] = s[0] + g * g;
    const F rooted = root(s[0]);
    p = p - h.lr * (g / (rooted + h.eps));
    return rooted;
  }
};

}  // namespace
}  // namespace fusedopt

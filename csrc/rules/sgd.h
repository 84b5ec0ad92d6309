// Stochastic gradient descent with momentum: Polyak, "Some methods of speeding up the convergence of
// iteration methods", 1964; Nesterov's in the form of Sutskever et al., ICML 2013.
//
//   g = g + wd p                        where wd is not 0
//   b = momentum b + (1 - dampening) g  momentum_buffer (kMomentum); in the first step b = g
//   d = g, or b, or g + momentum b (kNesterov)
//   p = p - lr d
//
// in this order, every operation rounded to fp32.
#pragma once

#include "rules/rule.h"

namespace fusedopt {
namespace {

template <bool kMomentum, bool kNesterov>
struct SGDRule {
  static constexpr int kStates = kMomentum ? 1 : 0;
  static constexpr const char* kStateNames[] = {"momentum_buffer"};
  static constexpr bool kSigned[] = {true};
  static constexpr int kRooted = -1;

  struct Config {
    double lr, momentum, dampening, weight_decay;
  };
  static constexpr ConfigField kFields[] = {
      {"lr", offsetof(Config, lr)},
      {"momentum", offsetof(Config, momentum)},
      {"dampening", offsetof(Config, dampening)},
      {"weight_decay", offsetof(Config, weight_decay)},
  };

  struct Hyper {
    float lr, momentum, one_minus_dampening, weight_decay;
  };

  static FUSEDOPT_FN Hyper derive(const Config& c, int64_t step) {
    return {
        static_cast<float>(c.lr),
        static_cast<float>(c.momentum),
        step == 1 ? 1.0f : static_cast<float>(1.0 - c.dampening),  // b begins as zeros
        static_cast<float>(c.weight_decay),
    };
  }

  template <class F>
  static FUSEDOPT_FN F update(F& p, F g, [[maybe_unused]] F* s, const Hyper& h) {
    g = h.weight_decay != 0.0f ? g + h.weight_decay * p : g;
    F direction = g;
    if constexpr (kMomentum) {
      s[0] = h.momentum * s[0] + h.one_minus_dampening * g;
      direction = kNesterov ? g + h.momentum * s[0] : s[0];
    }
    p = p - h.lr * direction;
    return F{};
  }
};

using SGD = SGDRule<false, false>;
using SGDMomentum = SGDRule<true, false>;
using SGDNesterov = SGDRule<true, true>;

}  // namespace
}  // namespace fusedopt

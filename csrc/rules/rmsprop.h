// RMSprop: Tieleman & Hinton, "Lecture 6.5 - rmsprop", Coursera: Neural Networks for Machine Learning, 2012;
// centered: Graves, "Generating Sequences With Recurrent Neural Networks", arXiv:1308.0850.
//
//   g = g + wd p                        where wd is not 0
//   v = a v + ((1 - a) g) g             square_avg
//   c = a c + (1 - a) g                 grad_avg (kCentered)
//   d = sqrt(v) + eps, or sqrt(max(v - c c, 0)) + eps
//   b = momentum b + g / d              momentum_buffer (kMomentum)
//   p = p - lr b, or p - lr (g / d)
//
// in this order, every operation rounded to fp32. The max keeps a variance that rounding has pushed below
// zero from becoming NaN.
#pragma once

#include "rules/rule.h"

namespace fusedopt {
namespace {

template <bool kCentered, bool kMomentum>
struct RMSpropRule {
  static constexpr int kStates = 1 + kCentered + kMomentum;
  static constexpr const char* kAllNames[] = {"momentum_buffer", "square_avg", "grad_avg"};
  static constexpr const char* const* kStateNames = kAllNames + (kMomentum ? 0 : 1);
  static constexpr bool kAllSigned[] = {true, false, true};
  static constexpr const bool* kSigned = kAllSigned + (kMomentum ? 0 : 1);
  static constexpr int kSquareAvg = kMomentum ? 1 : 0;
  static constexpr int kRooted = kCentered ? -1 : kSquareAvg;

  struct Config {
    double lr, alpha, eps, weight_decay, momentum;
  };
  static constexpr ConfigField kFields[] = {
      {"lr", offsetof(Config, lr)},
      {"alpha", offsetof(Config, alpha)},
      {"eps", offsetof(Config, eps)},
      {"weight_decay", offsetof(Config, weight_decay)},
      {"momentum", offsetof(Config, momentum)},
  };

  struct Hyper {
    float lr, alpha, one_minus_alpha, eps, weight_decay, momentum;
  };

  static FUSEDOPT_FN Hyper derive(const Config& c, int64_t) {
    return {
        static_cast<float>(c.lr),  static_cast<float>(c.alpha),        static_cast<float>(1.0 - c.alpha),
        static_cast<float>(c.eps), static_cast<float>(c.weight_decay), static_cast<float>(c.momentum),
    };
  }

  template <class F>
  static FUSEDOPT_FN F update(F& p, F g, F* s, const Hyper& h) {
    g = h.weight_decay != 0.0f ? g + h.weight_decay * p : g;
    F& square_avg = s[kSquareAvg];
    square_avg = h.alpha * square_avg + (h.one_minus_alpha * g) * g;
    F second = square_avg;
    if constexpr (kCentered) {
      F& grad_avg = s[kSquareAvg + 1];
      grad_avg = h.alpha * grad_avg + h.one_minus_alpha * g;
      second = maximum(second - grad_avg * grad_avg, F{});
    }
    const F rooted = root(second);
    F direction = g / (rooted + h.eps);
    if constexpr (kMomentum) direction = s[0] = h.momentum * s[0] + direction;
    p = p - h.lr * direction;
    return rooted;
  }
};

using RMSprop = RMSpropRule<false, false>;
using RMSpropMomentum = RMSpropRule<false, true>;
using RMSpropCentered = RMSpropRule<true, false>;
using RMSpropCenteredMomentum = RMSpropRule<true, true>;

}  // namespace
}  // namespace fusedopt

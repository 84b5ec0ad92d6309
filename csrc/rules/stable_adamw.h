// StableAdamW: AdamW whose learning rate is divided, tensor by tensor, by what would make an update too large.
//
//   Wortsman et al., "Stable and low-precision training for large-scale vision-language models", arXiv:2304.13013,
//   section 3.5; the debiased betas are those of Adafactor, arXiv:1804.04235, section 7.1
//
//   b^   = (b - b^t) / (1 - b^t)             what moments keep; 1 - b^ is what they take
//   v'   = b2^ v + (1 - b2^) (g g)
//   u    = g / sqrt(max(v', eps^2))
//   lr   = lr / max(1, RMS(u))
//   p    = p (1 - lr wd)                     of a decay that has a learning rate of its own: 1 - (lr / max_lr) wd
//   m, v = b1^ m + (1 - b1^) g, b2^ v + ((1 - b2^) g) g        exp_avg, exp_avg_sq
//   p    = p - lr (m / (sqrt(v) + eps))
//
// The last three lines are AdamW's (rules/adamw.h), with the betas of this step and no further correction: 1 in its
// place. Every operation is rounded to fp32, b^ and lr in double and once; RMS is a sum in double (rules/normalize.h).
#pragma once

#include "rules/adamw.h"
#include "rules/normalize.h"

namespace fusedopt {
namespace {

struct StableAdamW {
  static constexpr int kStates = AdamW::kStates;
  static constexpr const char* const* kStateNames = AdamW::kStateNames;
  static constexpr const bool* kSigned = AdamW::kSigned;
  static constexpr int kRooted = AdamW::kRooted;

  static constexpr bool kNormalizes = true;
  static constexpr bool kTakesQuotient = false;
  static constexpr int kSecondMoment = 1;

  struct Config {
    double lr, beta1, beta2, eps, weight_decay;
    double max_lr;  // 1 if the decay goes with the learning rate
  };
  static constexpr ConfigField kFields[] = {
      {"lr", offsetof(Config, lr)},
      {"beta1", offsetof(Config, beta1)},
      {"beta2", offsetof(Config, beta2)},
      {"eps", offsetof(Config, eps)},
      {"weight_decay", offsetof(Config, weight_decay)},
      {"max_lr", offsetof(Config, max_lr)},
  };

  struct Hyper {
    Moments moments;
    AdamW::Hyper adamw;
  };

  static FUSEDOPT_FN bool reads_weights(const Config&) { return false; }

  static FUSEDOPT_FN double kept(double beta, double faded) { return (beta - faded) / (1.0 - faded); }
  static FUSEDOPT_FN double taken(double beta, double faded) { return (1.0 - beta) / (1.0 - faded); }

  static FUSEDOPT_FN Hyper derive(const Config& c, int64_t step, const TensorSums& sums) {
    const double faded1 = power(c.beta1, step), faded2 = power(c.beta2, step);
    const double rms = root(sums.update / static_cast<double>(sums.numel));
    const double lr = c.lr / (rms < 1.0 ? 1.0 : rms);  // NaN stays NaN
    Hyper h{};
    h.adamw = {
        static_cast<float>(c.weight_decay),
        static_cast<float>(1.0 - lr / c.max_lr * c.weight_decay),
        static_cast<float>(kept(c.beta1, faded1)),
        static_cast<float>(taken(c.beta1, faded1)),
        static_cast<float>(kept(c.beta2, faded2)),
        static_cast<float>(taken(c.beta2, faded2)),
        static_cast<float>(lr),
        1.0f,
        static_cast<float>(c.eps),
    };
    h.moments.keep = h.adamw.beta2;
    h.moments.take = h.adamw.one_minus_beta2;
    h.moments.is_clamped = true;
    h.moments.least = static_cast<float>(c.eps * c.eps);
    return h;
  }

  template <class F>
  static FUSEDOPT_FN F update(F& p, F g, F* s, const Hyper& h) {
    return AdamW::update(p, g, s, h.adamw);
  }
};

}  // namespace
}  // namespace fusedopt

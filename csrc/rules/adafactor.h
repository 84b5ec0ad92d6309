// Adafactor: Shazeer & Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", arXiv:1804.04235.
//
//   k, t = 1 - step^c, step^c           c < 0: what second moments keep, and take
//   R    = k R + t (mean of g g along rows + eps1)        exp_avg_sq_row, of a matrix
//   C    = k C + t (mean of g g along columns + eps1)     exp_avg_sq_col
//   u    = (1/sqrt(R / mean R) * 1/sqrt(C)) g
//   v    = k v + t (g g + eps1)         exp_avg_sq, where there is no matrix
//   u    = g / sqrt(v)
//   d    = max(1, RMS(u) / clip_threshold)        of a matrix, sum of u u = mean R * sum of g g / (R C)
//   a    = max(eps2, RMS(p)) (scale_parameter), times the relative step or lr
//   m    = b1 m + (1 - b1) (u / d)      exp_avg (kMomentum); compat: of u a / d
//   p    = p - (a wd) p - a/d u, or - a m, or - m
//
// in this order, every operation rounded to fp32; means and a, d in double, rounded once. Torch's equation
// (torch.optim.Adafactor) adds no eps1 but keeps mean R above eps1 and what is under a root above eps1^2; there
// p is multiplied by 1 - lr wd.
#pragma once

#include <algorithm>
#include <cmath>

#include "rules/normalize.h"

namespace fusedopt {
namespace {

template <bool kVector, bool kMomentum>
struct AdafactorRule {
  static constexpr int kStates = kVector + kMomentum;
  static constexpr const char* kAllNames[] = {"exp_avg", "exp_avg_sq"};
  static constexpr const char* const* kStateNames = kAllNames + (kMomentum ? 0 : 1);
  static constexpr bool kAllSigned[] = {true, false};
  static constexpr const bool* kSigned = kAllSigned + (kMomentum ? 0 : 1);
  static constexpr int kRooted = -1;

  static constexpr bool kNormalizes = true;
  static constexpr bool kTakesQuotient = true;
  static constexpr int kSecondMoment = kVector ? (kMomentum ? 1 : 0) : -1;
  static constexpr const char* kRowName = "exp_avg_sq_row";
  static constexpr const char* kColumnName = "exp_avg_sq_col";

  struct Config {
    double lr, eps1, eps2, clip_threshold, decay_rate, beta1, weight_decay;
    double scale_parameter, relative_step, warmup_init, compat, is_torch;  // 0 or 1
  };
  static constexpr ConfigField kFields[] = {
      {"lr", offsetof(Config, lr)},
      {"eps1", offsetof(Config, eps1)},
      {"eps2", offsetof(Config, eps2)},
      {"clip_threshold", offsetof(Config, clip_threshold)},
      {"decay_rate", offsetof(Config, decay_rate)},
      {"beta1", offsetof(Config, beta1)},
      {"weight_decay", offsetof(Config, weight_decay)},
      {"scale_parameter", offsetof(Config, scale_parameter)},
      {"relative_step", offsetof(Config, relative_step)},
      {"warmup_init", offsetof(Config, warmup_init)},
      {"compat", offsetof(Config, compat)},
      {"is_torch", offsetof(Config, is_torch)},
  };

  struct Hyper {
    Moments moments;
    float decay, lost;  // p becomes p decay, then p - lost p
    float scale, lr, beta1, one_minus_beta1;
  };

  static FUSEDOPT_FN bool reads_weights(const Config& c) { return c.scale_parameter != 0.0; }

  static FUSEDOPT_FN double at_least(double least, double value) {
    return value < least ? least : value;
  }  // NaN stays NaN

  static FUSEDOPT_FN double rms(double square_sum, int64_t numel) {
    return root(square_sum / static_cast<double>(numel));
  }

  static FUSEDOPT_FN double relative_lr(const Config& c, int64_t step) {
    const double shrinking = 1.0 / root(static_cast<double>(step));
    if (c.is_torch != 0.0) return std::min(c.lr, shrinking);
    if (c.relative_step == 0.0) return c.lr;
    return std::min(c.warmup_init != 0.0 ? 1e-6 * static_cast<double>(step) : 1e-2, shrinking);
  }

  static FUSEDOPT_FN Hyper derive(const Config& c, int64_t step, const TensorSums& sums) {
    Hyper h{};
    const double take = std::pow(static_cast<double>(step), c.decay_rate);
    h.moments.keep = static_cast<float>(1.0 - take);
    h.moments.take = static_cast<float>(take);
    if (c.is_torch != 0.0) {
      const double eps = c.eps1 < 0.0 ? epsilon_of(sums.dtype) : c.eps1;
      h.moments.is_clamped = true;
      h.moments.least_mean = static_cast<float>(eps);
      h.moments.least = static_cast<float>(eps * eps);
    } else {
      h.moments.eps = c.eps1;
    }
    double lr = relative_lr(c, step);
    if (reads_weights(c)) lr = at_least(c.eps2, rms(sums.param, sums.numel)) * lr;
    const double denominator = at_least(1.0, rms(sums.update, sums.numel) / c.clip_threshold);
    h.decay = c.is_torch != 0.0 ? static_cast<float>(1.0 - c.weight_decay * c.lr) : 1.0f;
    h.lost = c.is_torch != 0.0 ? 0.0f : static_cast<float>(c.weight_decay * lr);
    h.beta1 = static_cast<float>(c.beta1);
    h.one_minus_beta1 = static_cast<float>(1.0 - c.beta1);
    const bool scales_by_lr = !kMomentum || c.compat != 0.0;
    h.scale = static_cast<float>((scales_by_lr ? lr : 1.0) / denominator);
    h.lr = scales_by_lr ? 1.0f : static_cast<float>(lr);
    return h;
  }

  template <class F>
  static FUSEDOPT_FN F update(F& p, F u, [[maybe_unused]] F* s, const Hyper& h) {
    F direction = h.scale * u;
    if constexpr (kMomentum) {
      s[0] = h.beta1 * s[0] + h.one_minus_beta1 * direction;
      direction = h.lr * s[0];
    }
    p = p * h.decay;
    p = (h.lost != 0.0f ? p - h.lost * p : p) - direction;
    return F{};
  }
};

using AdafactorMatrix = AdafactorRule<false, false>;
using AdafactorMatrixMomentum = AdafactorRule<false, true>;
using AdafactorVector = AdafactorRule<true, false>;
using AdafactorVectorMomentum = AdafactorRule<true, true>;

}  // namespace
}  // namespace fusedopt

// What is shared by rules that divide a gradient by the root of its second moment before the update, and must
// know the RMS of the quotient before they can take the step: sums over a tensor come first.
//
// Beyond rule.h, such a rule has
//
//   static constexpr bool kNormalizes = true;
//   static constexpr bool kTakesQuotient;        whether update gets the quotient u instead of the gradient, and the
//                                                second moment up to date; if not, the sums change nothing: update
//                                                brings the second moment up to date, which may have any format
//   static constexpr int kSecondMoment;          the state that holds the second moment, float32 where update does not
//                                                store it; or -1:
//   static constexpr const char *kRowName, *kColumnName;  it is factored into averages over rows and columns
//   Moments Hyper::moments;
//   static FUSEDOPT_FN bool reads_weights(const Config&);    whether derive needs TensorSums::param
//   static FUSEDOPT_FN Hyper derive(const Config&, int64_t step, const TensorSums&);
//                                                called again once sums are known; moments need none
#pragma once

#include <type_traits>

#include "rules/rule.h"

namespace fusedopt {

// How second moments move, and what keeps them from zero: either eps is added to squares, or there are floors.
struct Moments {
  float keep, take;
  double eps;  // added to the square of a gradient, or to means of squares
  bool is_clamped;
  float least_mean;  // floor of the mean of row averages
  float least;       // floor of a second moment under the root
};

// Sums over one tensor, and what goes with them.
struct TensorSums {
  double param = 0.0;   // of squared weights
  double update = 0.0;  // of squared u
  int64_t numel = 0;
  DType dtype = DType::kFloat32;  // of the parameter
};

namespace {

FUSEDOPT_FN float average(float held, float value, const Moments& m) { return m.keep * held + m.take * value; }

// The new average of a row or column, from the old one and the sum of its squares.
FUSEDOPT_FN float moved_average(float held, double square_sum, int64_t count, const Moments& m) {
  const double mean = square_sum / static_cast<double>(count);
  return average(held, static_cast<float>(m.is_clamped ? mean : mean + m.eps), m);
}

// The second moment of a single element.
template <bool kClamped>
FUSEDOPT_FN float second_moment(float v, float g, const Moments& m) {
  const float square = g * g;
  return average(v, kClamped ? square : square + static_cast<float>(m.eps), m);
}

template <bool kClamped>
FUSEDOPT_FN float normalize(float g, float v, const Moments& m) {
  return g / root(kClamped ? maximum(v, m.least) : v);
}

FUSEDOPT_FN float inverse_root(float x) { return 1.0f / root(x); }

// The factor of a row, by which its elements are multiplied: from the row's average and the mean of all averages.
FUSEDOPT_FN float row_factor(float average, float mean, const Moments& m) {
  return m.is_clamped ? average / maximum(mean, m.least_mean) : inverse_root(average / mean);
}
FUSEDOPT_FN float column_factor(float average, const Moments& m) {
  return m.is_clamped ? average : inverse_root(average);
}

// What a row's gradients are multiplied by before their squares go to the weighted sums of columns: sum of u u =
// mean R * sum over columns of (sum over rows of (weight g)^2) / C.
FUSEDOPT_FN float weight_of_row(float average) { return inverse_root(average); }

template <bool kClamped>
FUSEDOPT_FN float normalize(float g, float row, float column, const Moments& m) {
  return kClamped ? normalize<true>(g, row * column, m) : (row * column) * g;
}

template <class Rule, class = void>
constexpr bool kIsNormalizing = false;
template <class Rule>
constexpr bool kIsNormalizing<Rule, std::enable_if_t<Rule::kNormalizes>> = true;

template <class Rule, class = void>
constexpr bool kGetsQuotient = false;
template <class Rule>
constexpr bool kGetsQuotient<Rule, std::enable_if_t<Rule::kNormalizes>> = Rule::kTakesQuotient;

}  // namespace

}  // namespace fusedopt

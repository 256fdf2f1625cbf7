// The scalars of gradient surgery and AdamW, in float64, by the same code on host and device.
#pragma once

#include <math.h>

#include <limits>

#include "gradsafe/surgery_adamw.h"

#if defined(__CUDACC__)
#define GRADSAFE_HOST_DEVICE __host__ __device__
#else
#define GRADSAFE_HOST_DEVICE
#endif

namespace gradsafe {

// rho - min(dot, 0) / sq_align. NaN says "leave everything as it is": a sum is not finite, or the
// coefficient has no float32. sq_align = 0 means that the alignment gradient is zero.
GRADSAFE_HOST_DEVICE inline double surgery_coefficient(const double* sums, double rho) {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  constexpr double kLargest = std::numeric_limits<float>::max();
  const double dot = sums[kDot], sq_user = sums[kSqUser], sq_align = sums[kSqAlign];
  // The difference of a number with itself is 0 unless it is NaN or infinite.
  if (!(dot - dot == 0 && sq_user - sq_user == 0 && sq_align - sq_align == 0)) return kNan;
  const double coefficient = dot < 0 && sq_align > 0 ? rho - dot / sq_align : rho;
  return coefficient <= kLargest && coefficient >= -kLargest ? coefficient : kNan;
}

// Coefficient of vector j, given the conflict (subspace_surgery.h).
GRADSAFE_HOST_DEVICE inline double subspace_coefficient(const double* sums,
                                                        const double* direction, int j, double rho,
                                                        double conflict) {
  if (conflict != conflict) return conflict;
  return rho * direction[j] - (conflict < 0 ? sums[j] : 0);
}

// <u, a> from the sums. NaN says "leave everything as it is", as above.
GRADSAFE_HOST_DEVICE inline double subspace_conflict(const double* sums, const double* direction,
                                                     int rank, double rho) {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  constexpr double kLargest = std::numeric_limits<float>::max();
  double conflict = 0;
  for (int j = 0; j < rank; ++j) conflict += direction[j] * sums[j];
  if (!(conflict - conflict == 0 && sums[rank] - sums[rank] == 0)) return kNan;
  for (int j = 0; j < rank; ++j) {
    const double coefficient = subspace_coefficient(sums, direction, j, rho, conflict);
    if (!(coefficient <= kLargest && coefficient >= -kLargest && sums[j] - sums[j] == 0)) {
      return kNan;
    }
  }
  return conflict;
}

// base^exponent by squaring: the library's pow differs between host and device.
GRADSAFE_HOST_DEVICE inline double integer_power(double base, int64_t exponent) {
  double power = 1;
  for (; exponent > 0; exponent /= 2) {
    if (exponent % 2 == 1) power *= base;
    base *= base;
  }
  return power;
}

// `step` is t: the number of this update, 1 for the first.
GRADSAFE_HOST_DEVICE inline AdamwScalars adamw_scalars(const AdamwOptions& options, float step) {
  const int64_t t = static_cast<int64_t>(step);
  AdamwScalars s;
  // Added to 1 only when it meets a parameter: 1 - lr * weight_decay in float32 would be wrong the
  // same way in every step.
  s.decay = static_cast<float>(-options.lr * options.weight_decay);
  s.rate1 = static_cast<float>(1 - options.beta1);
  s.beta2 = static_cast<float>(options.beta2);
  s.rate2 = static_cast<float>(1 - options.beta2);
  s.step_size = static_cast<float>(options.lr / (1 - integer_power(options.beta1, t)));
  s.inv_sqrt = static_cast<float>(1 / sqrt(1 - integer_power(options.beta2, t)));
  s.eps = static_cast<float>(options.eps);
  return s;
}

}  // namespace gradsafe

// From a row's shifted sums to its divergence; shared by the CPU and CUDA kernels.
#pragma once

#include <math.h>

#if defined(__CUDACC__)
#define GRADSAFE_HOST_DEVICE __host__ __device__
#else
#define GRADSAFE_HOST_DEVICE
#endif

namespace gradsafe {

// Largest logits seen so far. They start at the lowest finite number, so that rows (or parts of
// rows) of -inf have exp(-inf - maximum) = 0 and not NaN. NaN never becomes a maximum; it reaches
// the sums.
struct KlMaxima {
  float student, teacher;
};
constexpr float kLowestLogit = -3.4028234663852886e38f;

// Sums over a row, or a part of it, relative to its maxima.
struct KlSums {
  double student;  // sum of exp(s - max s)
  double teacher;  // sum of exp(t - max t)
  double cross;    // sum of exp(t - max t) ((t - max t) - (s - max s)); 0 where the exponential is 0
};

// `cross` after its maxima grew: `factor` is exp(-growth of max t), `apart` the growth of max t less
// that of max s, `teacher` the sum before. What underflows has no share left, even if `cross` was
// infinite; NaN stays in the two other sums.
template <class Float>
GRADSAFE_HOST_DEVICE inline Float moved_cross(Float cross, Float teacher, Float apart,
                                              Float factor) {
  if (factor == 0) return Float{0};
  return factor * (teacher == 0 || apart == 0 ? cross : cross - apart * teacher);
}

// sum p_t (log p_t - log p_s) = cross / Z_t + log(Z_s / Z_t): differences to the maxima are small
// where p_t is not, so large logits cost no accuracy. Equal rows give exactly 0; rounding may push a
// tiny value below 0, where no divergence is. `cross` is in multiples of `unit`.
GRADSAFE_HOST_DEVICE inline float kl_value(const KlSums& sums, double unit = 1.0) {
  const double value = unit * (sums.cross / sums.teacher) + log(sums.student / sums.teacher);
  return static_cast<float>(value < 0 ? 0.0 : value);
}

}  // namespace gradsafe

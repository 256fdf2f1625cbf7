// exp(x) for x <= 0. Included once per instruction set, inside its anonymous namespace.
//
// x = n log 2 + r with |r| <= log(2) / 2, exp(r) = 1 + r + r^2 q(r); q is the polynomial of degree 4
// with the least relative error on that interval (3.8e-9 with its coefficients in float32). Over
// every float32 in [-87.3, 0] the error is at most 1.01 ulp, at every level.
// Below -87.3 the result is 0; NaN stays NaN.

constexpr float kExpFloor = -87.3f;  // exp of it is the last power of two that is not subnormal

inline Vec exp_nonpositive(Vec x) {
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  const Vec shifter = broadcast(12582912.0f);
  const Vec shifted = fma(x, broadcast(1.44269504f), shifter);
  const Vec n = sub(shifted, shifter);
  // log 2 in two parts; n times the first is exact.
  Vec r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec q = broadcast(0.00138145988f);
  q = fma(q, r, broadcast(0.00836871658f));
  q = fma(q, r, broadcast(0.041668389f));
  q = fma(q, r, broadcast(0.166665211f));
  q = fma(q, r, broadcast(0.49999994f));
  const Vec power = add(fma(mul(r, r), q, r), broadcast(1.0f));
  return zero_if_less(x, broadcast(kExpFloor), add_to_exponent(power, shifted));
}

// Scaling of vectors before their cosine is computed. The cosine does not change with the length of
// its vectors, but squares of entries above 1e19 overflow float32 and those below 1e-23 vanish. A
// power of two rounds nothing.
#pragma once

#include <cstdint>

namespace gradsafe {

constexpr bool is_finite_magnitude(uint32_t bits) { return bits < 0x7f800000u; }

// Bits of the float32 factor for a vector whose largest magnitude has these bits (of a float32,
// finite): 1 from 2^-32 to 2^33, else what brings a normal magnitude near 1.
constexpr uint32_t cosine_scale_bits(uint32_t largest) {
  const int32_t exponent = static_cast<int32_t>(largest >> 23);  // 127 more than the true one
  if (exponent >= 127 - 32 && exponent <= 127 + 32) return 127u << 23;
  const int32_t factor = 254 - exponent;  // biased alike
  return static_cast<uint32_t>(factor < 1 ? 1 : factor) << 23;
}

}  // namespace gradsafe

// A score and its row as one integer whose order is the order of the result: keys of different rows
// always differ, so the k largest are the same set and the same list however they were found.
#pragma once

#include <cstdint>

namespace gradsafe {

constexpr uint32_t kNanBits = 0x7fc00000u;

// Bits of a float32 as an unsigned integer of the same order. NaN, of either sign and any payload,
// is above infinity; -0 is 0.
constexpr uint32_t ordered_bits(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return kNanBits | 0x80000000u;
  if (magnitude == 0) return 0x80000000u;
  return bits == magnitude ? bits | 0x80000000u : ~bits;
}

// No key is 0, which therefore stands for "no row".
constexpr uint64_t topk_key(uint32_t score_bits, uint32_t row) {
  return (uint64_t{ordered_bits(score_bits)} << 32) | (0xffffffffu - row);
}
constexpr uint32_t key_score_bits(uint64_t key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  return ordered & 0x80000000u ? ordered ^ 0x80000000u : ~ordered;
}
constexpr int64_t key_row(uint64_t key) {
  return int64_t{0xffffffffu - static_cast<uint32_t>(key)};
}

}  // namespace gradsafe

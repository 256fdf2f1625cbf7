// Panels of bfloat16 weight gradients, two tokens per instruction (vdpbf16ps): twice the products of
// float32, and the same bits. The instruction adds the product of the high halves first, then that
// of the low ones, each with one rounding, as two fused multiply-adds would. It flushes subnormal
// numbers, so that it only serves samples in which none can occur (see pairs_are_exact).
//
// Included by level_avx512.cpp. Only these functions need AVX512_BF16; dispatch asks the processor.
#define GRADSAFE_BF16 __attribute__((target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")))

// Words of two tokens, the earlier one in the high half; the last may be alone.
GRADSAFE_BF16 void pack_pairs(const PackArgs& a) {
  const uint16_t* matrix = static_cast<const uint16_t*>(a.matrix) + a.first_col;
  const auto widened = [](const uint16_t* p, int64_t n) {
    const __mmask16 mask = static_cast<__mmask16>((1u << n) - 1u);
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
  };
  for (int64_t t = 0; t < a.count; t += 2) {
    const uint16_t* first = matrix + a.tokens[t] * a.stride;
    const uint16_t* second = t + 1 < a.count ? matrix + a.tokens[t + 1] * a.stride : nullptr;
    float* out = a.out + t / 2 * a.padded;
    for (int64_t c = 0; c < a.padded; c += kLanes) {
      const int64_t left = a.width - c;
      const int64_t n = left < 0 ? 0 : left < kLanes ? left : kLanes;
      const __m512i high = _mm512_slli_epi32(widened(first + c, n), 16);
      const __m512i low = second ? widened(second + c, n) : _mm512_setzero_si512();
      _mm512_storeu_si512(out + c, _mm512_or_si512(high, low));
    }
  }
}

template <int C>
GRADSAFE_BF16 inline void pair_tile(const float* dy, const float* x, int64_t pairs, float* out,
                                    int64_t out_stride) {
  __m512 sums[kPanelRows][C];
  for (int i = 0; i < kPanelRows; ++i) {
    for (int c = 0; c < C; ++c) sums[i][c] = _mm512_setzero_ps();
  }
  for (int64_t t = 0; t < pairs; ++t) {
    __m512bh columns[C];
    for (int c = 0; c < C; ++c) {
      columns[c] = (__m512bh)_mm512_loadu_si512(x + t * kChunkCols + c * kLanes);
    }
    for (int i = 0; i < kPanelRows; ++i) {
      const __m512bh row = (__m512bh)_mm512_set1_ps(dy[t * kPanelRows + i]);
      for (int c = 0; c < C; ++c) sums[i][c] = _mm512_dpbf16_ps(sums[i][c], row, columns[c]);
    }
  }
  for (int i = 0; i < kPanelRows; ++i) {
    for (int c = 0; c < C; ++c) _mm512_storeu_ps(out + i * out_stride + c * kLanes, sums[i][c]);
  }
}

GRADSAFE_BF16 void pair_panel(const WgradPanelArgs& a) {
  for (int64_t tile = 0; tile < a.row_tiles; ++tile) {
    const float* dy = a.dy + tile * a.tokens * kPanelRows;
    float* out = a.out + tile * kPanelRows * a.out_stride;
    int64_t v = 0;
    for (; v + kPanelVectors <= a.vectors; v += kPanelVectors) {
      pair_tile<kPanelVectors>(dy, a.x + v * kLanes, a.tokens, out + v * kLanes, a.out_stride);
    }
    for (; v < a.vectors; ++v) {
      pair_tile<1>(dy, a.x + v * kLanes, a.tokens, out + v * kLanes, a.out_stride);
    }
  }
}

#undef GRADSAFE_BF16

// Panels of cosines of bfloat16 vectors, two features per instruction (vdpbf16ps), with the bits of
// cosine_topk_impl.inl; wgrad_pairs_avx512.inl says why, and pairs_are_exact (kernels.h) when.
//
// Included by level_avx512.cpp. Only these functions need AVX512_BF16; dispatch asks the processor.
#define GRADSAFE_BF16 __attribute__((target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")))

// Words of two features, the earlier one in the high half; the last may be alone. Squares are summed
// in the order of pack_scaled.
PackedPairs pack_cosine_pairs(const uint16_t* row, int64_t features, float* out) {
  const __m512i magnitude = _mm512_set1_epi16(0x7fff), ones = _mm512_set1_epi16(-1);
  __m512i largest = _mm512_setzero_si512();
  __m512i smallest = ones;  // of magnitude - 1, which sends zero behind all others
  const auto widened = [](__m256i half) {
    return Vec{_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  };
  double total = 0;
  for (int64_t begin = 0; begin < features; begin += kCosineDepth) {
    const int64_t end = begin + kCosineDepth < features ? begin + kCosineDepth : features;
    Vec squares = zero();
    for (int64_t d = begin; d < end; d += 2 * kLanes) {
      const int64_t left = end - d;
      const __mmask32 mask = left < 2 * kLanes ? (1u << left) - 1u : ~0u;
      // What follows the row, most often the next one: a stream ends at each page.
      _mm_prefetch(reinterpret_cast<const char*>(row + features + d), _MM_HINT_T0);
      const __m512i numbers = _mm512_maskz_loadu_epi16(mask, row + d);
      _mm512_storeu_si512(out + d / 2, _mm512_rol_epi32(numbers, 16));
      const __m512i magnitudes = _mm512_and_si512(numbers, magnitude);
      largest = _mm512_max_epu16(largest, magnitudes);
      smallest = _mm512_min_epu16(smallest, _mm512_add_epi16(magnitudes, ones));
      const Vec first = widened(_mm512_castsi512_si256(numbers));
      const Vec second = widened(_mm512_extracti64x4_epi64(numbers, 1));
      squares = fma(first, first, squares);
      squares = fma(second, second, squares);
    }
    total += sum(squares);
  }
  largest = _mm512_max_epu16(largest, _mm512_rol_epi32(largest, 16));
  smallest = _mm512_min_epu16(smallest, _mm512_rol_epi32(smallest, 16));
  const uint32_t most = _mm512_reduce_max_epu32(largest) >> 16;
  const uint32_t least = _mm512_reduce_min_epu32(smallest) >> 16;
  return {total, most << 16, least == 0xffff ? 255 : static_cast<int>(least + 1) >> 7};
}

template <int C>
GRADSAFE_BF16 void cosine_pair_tile(const float* rows, int64_t stride, const float* queries,
                                    int64_t words, double* sums) {
  __m512 chains[kPanelRows][C];
  for (int i = 0; i < kPanelRows; ++i) {
    for (int c = 0; c < C; ++c) chains[i][c] = _mm512_setzero_ps();
  }
  for (int64_t w = 0; w < words; ++w) {
    __m512bh columns[C];
    for (int c = 0; c < C; ++c) {
      columns[c] = (__m512bh)_mm512_loadu_si512(queries + w * kCosinePanel + c * kLanes);
    }
    for (int i = 0; i < kPanelRows; ++i) {
      const __m512bh row = (__m512bh)_mm512_set1_ps(rows[i * stride + w]);
      for (int c = 0; c < C; ++c) chains[i][c] = _mm512_dpbf16_ps(chains[i][c], row, columns[c]);
    }
  }
  for (int i = 0; i < kPanelRows; ++i) {
    for (int c = 0; c < C; ++c) {
      add_to(sums + i * kCosinePanel + c * kLanes, Vec{chains[i][c]});
    }
  }
}

void cosine_pair_panel(const CosinePanelArgs& a) {
  cosine_panel_of<cosine_pair_tile<kPanelVectors>, cosine_pair_tile<1>>(a, kCosineDepth / 2);
}

#undef GRADSAFE_BF16

// Panels of cosines of bfloat16 vectors, two features per instruction (vdpbf16ps), with the bits of
// cosine_topk_impl.inl; wgrad_pairs_avx512.inl says why, and pairs_are_exact (kernels.h) when.
//
// Included by level_avx512.cpp. Only these functions need AVX512_BF16; dispatch asks the processor.
#define GRADSAFE_BF16 __attribute__((target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")))

// Words of two features, the earlier one in the high half; the last may be alone.
void pack_cosine_pairs(const uint16_t* row, int64_t features, float* out) {
  for (int64_t d = 0; d < features; d += 2 * kLanes) {
    const int64_t left = features - d;
    const __mmask32 mask = left < 2 * kLanes ? (1u << left) - 1u : ~0u;
    const __m512i words = _mm512_rol_epi32(_mm512_maskz_loadu_epi16(mask, row + d), 16);
    _mm512_storeu_si512(out + d / 2, words);
  }
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

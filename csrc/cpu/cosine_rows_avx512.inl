// Products of sixteen rows with a few queries, the rows read where they lie. Included by
// level_avx512.cpp.
//
// The lanes of a chain are rows, so that a chain adds its products in the order of the features, as
// panels do (cosine_topk_impl.inl): the bits are the same. Squares are summed as when packing.

// Columns of sixteen rows of sixteen float32.
inline void transpose(__m512 (&v)[kLanes]) {
  __m512 pairs[kLanes], quads[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < kLanes; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(pairs[i + j]);
      const __m512d high = _mm512_castps_pd(pairs[i + j + 2]);
      quads[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      quads[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  for (int j = 0; j < 4; ++j) {  // quads[4 i + j] holds columns j, j + 4, j + 8, j + 12 of rows 4 i ..
    const __m512 a = _mm512_shuffle_f32x4(quads[j], quads[j + 4], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(quads[j + 8], quads[j + 12], 0x88);
    const __m512 c = _mm512_shuffle_f32x4(quads[j], quads[j + 4], 0xdd);
    const __m512 d = _mm512_shuffle_f32x4(quads[j + 8], quads[j + 12], 0xdd);
    v[j] = _mm512_shuffle_f32x4(a, b, 0x88);
    v[j + 8] = _mm512_shuffle_f32x4(a, b, 0xdd);
    v[j + 4] = _mm512_shuffle_f32x4(c, d, 0x88);
    v[j + 12] = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
}

template <class T, int Q>
inline void products_in_place(const CosineRowsArgs& a) {
  const T* rows[kLanes];
  for (int64_t r = 0; r < kLanes; ++r) {
    rows[r] = static_cast<const T*>(a.rows) + (r < a.count ? r : 0) * a.row_stride;
  }
  __m512i largest[kLanes];
  __m512d dots[Q][2];
  for (int r = 0; r < kLanes; ++r) largest[r] = _mm512_setzero_si512();
  for (int q = 0; q < Q; ++q) dots[q][0] = dots[q][1] = _mm512_setzero_pd();
  for (int r = 0; r < kLanes; ++r) a.squares[r] = 0;
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  for (int64_t begin = 0; begin < a.features; begin += kCosineDepth) {
    const int64_t end = begin + kCosineDepth < a.features ? begin + kCosineDepth : a.features;
    for (int64_t r = 0; r < a.count; ++r) {
      Vec squares = zero();
      __m512i most = largest[r];
      for (int64_t i = begin; i < end; i += kLanes) {
        const int left = static_cast<int>(end - i);
        const Vec v = left < kLanes ? load_first(rows[r] + i, left) : load(rows[r] + i);
        // The next chunk of the row: sixteen rows at once are more streams than are foreseen.
        _mm_prefetch(reinterpret_cast<const char*>(rows[r] + i + kCosineDepth), _MM_HINT_T0);
        squares = fma(v, v, squares);
        most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(v.v), magnitude));
      }
      a.squares[r] += sum(squares);
      largest[r] = most;
    }
    __m512 chains[Q];
    for (int q = 0; q < Q; ++q) chains[q] = _mm512_setzero_ps();
    for (int64_t i = begin; i < end; i += kLanes) {
      const int left = static_cast<int>(end - i);
      __m512 v[kLanes];
      for (int r = 0; r < kLanes; ++r) {
        v[r] = (left < kLanes ? load_first(rows[r] + i, left) : load(rows[r] + i)).v;
      }
      transpose(v);
      // Features behind the end are zeros on both sides.
      for (int j = 0; j < kLanes; ++j) {
        for (int q = 0; q < Q; ++q) {
          const __m512 query = _mm512_set1_ps(a.queries[q * a.query_stride + i + j]);
          chains[q] = _mm512_fmadd_ps(v[j], query, chains[q]);
        }
      }
    }
    for (int q = 0; q < Q; ++q) {
      const __m256 low = _mm512_castps512_ps256(chains[q]);
      const __m256 high = _mm512_extractf32x8_ps(chains[q], 1);
      dots[q][0] = _mm512_add_pd(dots[q][0], _mm512_cvtps_pd(low));
      dots[q][1] = _mm512_add_pd(dots[q][1], _mm512_cvtps_pd(high));
    }
  }
  for (int q = 0; q < Q; ++q) {
    _mm512_storeu_pd(a.dots + q * kLanes, dots[q][0]);
    _mm512_storeu_pd(a.dots + q * kLanes + kLanes / 2, dots[q][1]);
  }
  for (int r = 0; r < kLanes; ++r) a.largest[r] = _mm512_reduce_max_epu32(largest[r]);
}

template <class T>
inline void rows_in_place_of(const CosineRowsArgs& a) {
  switch (a.num_queries) {
    case 1: return products_in_place<T, 1>(a);
    case 2: return products_in_place<T, 2>(a);
    case 3: return products_in_place<T, 3>(a);
    default: return products_in_place<T, kCosineInPlace>(a);
  }
}

void cosine_rows(const CosineRowsArgs& a) {
  switch (a.dtype) {
    case DType::f32: return rows_in_place_of<float>(a);
    case DType::bf16: return rows_in_place_of<bf16>(a);
    default: return rows_in_place_of<f16>(a);
  }
}

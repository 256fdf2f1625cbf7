// Panels of weight gradients. Included once per instruction set, inside its anonymous namespace.
//
// Every element is one chain of fused multiply-adds over the tokens, in their order, so the shape
// of the register tile does not show in the result.

// kPanelRows x (C vectors of 16) accumulators over all tokens.
template <int C>
inline void panel_tile(const float* dy, const float* x, int64_t tokens, float* out,
                       int64_t out_stride) {
  Vec sums[kPanelRows][C];
  for (int i = 0; i < kPanelRows; ++i) {
    for (int c = 0; c < C; ++c) sums[i][c] = zero();
  }
  for (int64_t t = 0; t < tokens; ++t) {
    Vec columns[C];
    for (int c = 0; c < C; ++c) columns[c] = load(x + t * kChunkCols + c * kLanes);
    for (int i = 0; i < kPanelRows; ++i) {
      const Vec row = broadcast(dy[t * kPanelRows + i]);
      for (int c = 0; c < C; ++c) sums[i][c] = fma(row, columns[c], sums[i][c]);
    }
  }
  for (int i = 0; i < kPanelRows; ++i) {
    for (int c = 0; c < C; ++c) store(out + i * out_stride + c * kLanes, sums[i][c]);
  }
}

void wgrad_panel(const WgradPanelArgs& a) {
  for (int64_t tile = 0; tile < a.row_tiles; ++tile) {
    const float* dy = a.dy + tile * a.tokens * kPanelRows;
    float* out = a.out + tile * kPanelRows * a.out_stride;
    int64_t v = 0;
    for (; v + kPanelVectors <= a.vectors; v += kPanelVectors) {
      panel_tile<kPanelVectors>(dy, a.x + v * kLanes, a.tokens, out + v * kLanes, a.out_stride);
    }
    for (; v < a.vectors; ++v) {
      panel_tile<1>(dy, a.x + v * kLanes, a.tokens, out + v * kLanes, a.out_stride);
    }
  }
}

template <class T>
void pack_rows(const PackArgs& a) {
  for (int64_t t = 0; t < a.count; ++t) {
    const T* row = static_cast<const T*>(a.matrix) + a.tokens[t] * a.stride + a.first_col;
    float* out = a.out + t * a.padded;
    int64_t c = 0;
    for (; c + kLanes <= a.width; c += kLanes) store(out + c, load(row + c));
    alignas(64) float rest[kLanes];
    store(rest, load_first(row + c, static_cast<int>(a.width - c)));
    for (int i = 0; c < a.padded; ++c, ++i) out[c] = i < kLanes ? rest[i] : 0.0f;
  }
}

void pack(const PackArgs& a) {
  switch (a.dtype) {
    case DType::f32: return pack_rows<float>(a);
    case DType::bf16: return pack_rows<bf16>(a);
    case DType::f16: return pack_rows<f16>(a);
    case DType::f8: return;  // a reference type only: the operators refuse it
  }
}

// Plus or minus zero: no bit but the sign is set.
inline bool all_zero(const uint16_t* p, int64_t n) {
  uint32_t bits = 0;
  for (int64_t i = 0; i < n; ++i) bits |= p[i] & 0x7fffu;
  return bits == 0;
}
inline bool all_zero(const uint32_t* p, int64_t n) {
  uint32_t bits = 0;
  for (int64_t i = 0; i < n; ++i) bits |= p[i] & 0x7fffffffu;
  return bits == 0;
}

// Finite means: not every bit of the exponent is set.
template <class Bits>
inline bool all_finite(const Bits* p, int64_t n, uint32_t exponent) {
  uint32_t worst = 0;
  for (int64_t i = 0; i < n; ++i) worst |= (p[i] & exponent) == exponent;
  return worst == 0;
}

int smallest_exponent(const uint16_t* p, int64_t n) {
  uint16_t least = 0xffff;  // of magnitude - 1, which sends zero behind all others
  for (int64_t i = 0; i < n; ++i) {
    const uint16_t below = static_cast<uint16_t>((p[i] & 0x7fffu) - 1u);
    least = below < least ? below : least;
  }
  return least == 0xffff ? 255 : (least + 1) >> 7;
}

bool is_idle_token(const WgradProblem& p, int64_t row) {
  if (p.dtype == DType::f32) {
    return all_zero(static_cast<const uint32_t*>(p.dy) + row * p.dy_stride, p.out_features) &&
           all_finite(static_cast<const uint32_t*>(p.x) + row * p.x_stride, p.in_features,
                      0x7f800000u);
  }
  return all_zero(static_cast<const uint16_t*>(p.dy) + row * p.dy_stride, p.out_features) &&
         all_finite(static_cast<const uint16_t*>(p.x) + row * p.x_stride, p.in_features,
                    p.dtype == DType::bf16 ? 0x7f80u : 0x7c00u);
}

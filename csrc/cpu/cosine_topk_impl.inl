// Cosine similarities of panels. Included once per instruction set, inside its anonymous namespace.
//
// A dot product is a chain of fused multiply-adds over at most kCosineDepth features, in their
// order; chains are added in float64. The shape of the register tile does not show in the result.

constexpr int64_t kCosineDepth = 256;

template <class Bits>
inline uint32_t largest_bits(const Bits* p, int64_t n, Bits mask) {
  Bits largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Bits bits = p[i] & mask;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

uint32_t largest_magnitude(const void* row, DType dtype, int64_t n) {
  if (dtype == DType::f32) {
    return largest_bits<uint32_t>(static_cast<const uint32_t*>(row), n, 0x7fffffffu);
  }
  const uint32_t bits = largest_bits<uint16_t>(static_cast<const uint16_t*>(row), n, 0x7fffu);
  if (dtype == DType::bf16) return bits << 16;
  const f16 largest[1] = {{static_cast<uint16_t>(bits)}};
  alignas(64) float wide[kLanes];
  store(wide, load_first(largest, 1));
  uint32_t wide_bits;
  __builtin_memcpy(&wide_bits, wide, sizeof wide_bits);
  return wide_bits;
}

template <class T>
inline double pack_scaled_row(const T* row, int64_t n, float scale, float* out) {
  const Vec factor = broadcast(scale);
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kCosineDepth) {
    const int64_t end = begin + kCosineDepth < n ? begin + kCosineDepth : n;
    Vec squares = zero();
    for (int64_t i = begin; i < end; i += kLanes) {
      const int left = static_cast<int>(end - i);
      const Vec v = left < kLanes ? load_first(row + i, left) : load(row + i);
      const Vec scaled = fma(v, factor, zero());
      store(out + i, scaled);
      squares = fma(scaled, scaled, squares);
    }
    total += sum(squares);
  }
  return total;
}

double pack_scaled(const PackScaledArgs& a) {
  switch (a.dtype) {
    case DType::f32:
      return pack_scaled_row(static_cast<const float*>(a.row), a.count, a.scale, a.out);
    case DType::bf16:
      return pack_scaled_row(static_cast<const bf16*>(a.row), a.count, a.scale, a.out);
    case DType::f16:
      return pack_scaled_row(static_cast<const f16*>(a.row), a.count, a.scale, a.out);
    case DType::f8:
      break;  // a reference type only: the operators refuse it
  }
  return 0;
}

// kPanelRows rows times C vectors of queries over one chunk of features.
template <int C>
inline void cosine_tile(const float* rows, int64_t stride, const float* queries, int64_t depth,
                        double* sums) {
  Vec chains[kPanelRows][C];
  for (int i = 0; i < kPanelRows; ++i) {
    for (int c = 0; c < C; ++c) chains[i][c] = zero();
  }
  for (int64_t d = 0; d < depth; ++d) {
    Vec columns[C];
    for (int c = 0; c < C; ++c) columns[c] = load(queries + d * kCosinePanel + c * kLanes);
    for (int i = 0; i < kPanelRows; ++i) {
      const Vec row = broadcast(rows[i * stride + d]);
      for (int c = 0; c < C; ++c) chains[i][c] = fma(row, columns[c], chains[i][c]);
    }
  }
  for (int i = 0; i < kPanelRows; ++i) {
    for (int c = 0; c < C; ++c) add_to(sums + i * kCosinePanel + c * kLanes, chains[i][c]);
  }
}

using CosineTile = void(const float*, int64_t, const float*, int64_t, double*);

// Chains are `chunk` steps long; Wide is a tile of kPanelVectors vectors, Narrow one of 1.
template <CosineTile Wide, CosineTile Narrow>
inline void cosine_panel_of(const CosinePanelArgs& a, int64_t chunk) {
  const int64_t width = a.vectors * kLanes;
  for (int64_t i = 0; i < a.row_tiles * kPanelRows * kCosinePanel; ++i) a.sums[i] = 0;
  for (int64_t d = 0; d < a.features; d += chunk) {
    const int64_t depth = a.features - d < chunk ? a.features - d : chunk;
    const float* queries = a.queries + d * kCosinePanel;
    for (int64_t tile = 0; tile < a.row_tiles; ++tile) {
      const float* rows = a.rows + tile * kPanelRows * a.row_stride + d;
      double* sums = a.sums + tile * kPanelRows * kCosinePanel;
      int64_t v = 0;
      for (; v + kPanelVectors <= a.vectors; v += kPanelVectors) {
        Wide(rows, a.row_stride, queries + v * kLanes, depth, sums + v * kLanes);
      }
      for (; v < a.vectors; ++v) {
        Narrow(rows, a.row_stride, queries + v * kLanes, depth, sums + v * kLanes);
      }
    }
  }
  for (int64_t i = 0; i < a.row_tiles * kPanelRows; ++i) {
    const double* sums = a.sums + i * kCosinePanel;
    float* scores = a.scores + i * kCosinePanel;
    for (int64_t j = 0; j < width; ++j) {
      // Rounding may carry a cosine past 1. NaN fails both comparisons and stays.
      const float cosine =
          static_cast<float>(sums[j] * (a.row_inverses[i] * a.query_inverses[j]));
      const float low = cosine < -1.0f ? -1.0f : cosine;
      scores[j] = low > 1.0f ? 1.0f : low;
    }
  }
}

void cosine_panel(const CosinePanelArgs& a) {
  cosine_panel_of<cosine_tile<kPanelVectors>, cosine_tile<1>>(a, kCosineDepth);
}

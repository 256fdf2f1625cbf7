// Moments of one tile. Included once per instruction set, inside its anonymous namespace.
//
// Order of sums (fixed, whatever the thread count): within a segment of kSegment columns sixteen
// float32 lanes each add every sixteenth element; a segment's lanes are folded in float64. Column
// sums stay in float32 for kFlushRows rows, then go to float64.

constexpr int64_t kSegment = kCpuTileCols;
constexpr int64_t kFlushRows = 16;

template <int K>
struct Sums {
  Vec v[2 + K];
};

// Adds one vector of g and its references to running sums.
template <int K>
inline void accumulate(Sums<K>& sums, Vec g, const Vec* refs, uint32_t mask) {
  const Vec magnitude = bit_and(g, mask);
  sums.v[0] = add(sums.v[0], g);
  sums.v[1] = fma(g, g, sums.v[1]);
  for (int k = 0; k < K; ++k) sums.v[2 + k] = fma(magnitude, refs[k], sums.v[2 + k]);
}

// Where the entries of P neighbouring rows come from: `read` sets g[p] to those at column c of the
// segment, all sixteen or the first n; of all rows before they are used, or `row` of one when its
// turn comes.

// A gradient in memory. A tile's row is too short for the hardware prefetcher to get going, so the
// next P rows are asked for here.
template <class T>
struct Stored {
  static constexpr int kRows = 2;
  static constexpr bool kTogether = false;
  template <int P>
  struct Rows {
    const T* at[P];
    int64_t ahead;

    Rows(const MomentsTileArgs& a, int64_t row, int64_t col) : ahead(P * a.task->grad_stride) {
      for (int p = 0; p < P; ++p) {
        at[p] = static_cast<const T*>(a.task->grad) + (row + p) * a.task->grad_stride + col;
      }
    }
    template <bool kPart>
    Vec row(int p, int64_t c, int n) const {
      prefetch(at[p] + ahead + c);
      return kPart ? load_first(at[p] + c, n) : load(at[p] + c);
    }
  };
};

// A product of few tokens, formed on the way: the same chain of fused multiply-adds as in a panel.
struct Formed {
  static constexpr int kRows = 4;
  static constexpr bool kTogether = true;
  template <int P>
  struct Rows {
    const float *dy, *x;
    int64_t tokens, dy_stride, x_stride;

    Rows(const MomentsTileArgs& a, int64_t row, int64_t col)
        : dy(a.factors->dy + row), x(a.factors->x + col), tokens(a.factors->tokens),
          dy_stride(a.factors->dy_stride), x_stride(a.factors->x_stride) {}
    template <bool kPart>
    void read(Vec* g, int64_t c, int n) const {
      for (int p = 0; p < P; ++p) g[p] = zero();
      const float *rows = dy, *columns = x + c;
      for (int64_t t = 0; t < tokens; ++t, rows += dy_stride, columns += x_stride) {
        const Vec column = load(columns);
        for (int p = 0; p < P; ++p) g[p] = fma(broadcast(rows[p]), column, g[p]);
      }
      // x is zero behind the edge, but dy may be infinite.
      for (int p = 0; kPart && p < P; ++p) g[p] = pad(g[p], n, 0.0f);
    }
  };
};

template <class G, class R, int K, bool kSums, bool kColumns>
struct Tile {
  static constexpr int Q = 2 + K;

  // The references of P neighbouring rows, and the distance to the next P.
  template <int P>
  struct Refs {
    const R* at[P][K > 0 ? K : 1];
    int64_t ahead[K > 0 ? K : 1];

    Refs(const MomentsTask& task, int64_t row, int64_t col) {
      for (int k = 0; k < K; ++k) {
        ahead[k] = P * task.ref_strides[k];
        for (int p = 0; p < P; ++p) {
          at[p][k] = static_cast<const R*>(task.refs[k]) + (row + p) * task.ref_strides[k] + col;
        }
      }
    }
  };

  // Sixteen columns (or the first n) of P rows. P rows share each column accumulator's load and
  // store, which are half of the work when columns are wanted.
  template <int P, bool kPart>
  static inline void step(const typename G::template Rows<P>& grad, const Refs<P>& at, int64_t c,
                          int n, uint32_t mask, Sums<K>* rows, float* columns) {
    Vec g[P];
    if constexpr (G::kTogether) grad.template read<kPart>(g, c, n);
    Sums<K> column;
    if (kColumns) {
      for (int q = 0; q < Q; ++q) column.v[q] = load(columns + q * kSegment + c);
    }
    for (int p = 0; p < P; ++p) {
      if constexpr (!G::kTogether) g[p] = grad.template row<kPart>(p, c, n);
      Vec refs[K > 0 ? K : 1];
      for (int k = 0; k < K; ++k) {
        refs[k] = kPart ? load_first(at.at[p][k] + c, n) : load(at.at[p][k] + c);
        prefetch(at.at[p][k] + at.ahead[k] + c);
      }
      if (kSums) accumulate<K>(rows[p], g[p], refs, mask);
      if (kColumns) accumulate<K>(column, g[p], refs, mask);
    }
    if (kColumns) {
      for (int q = 0; q < Q; ++q) store(columns + q * kSegment + c, column.v[q]);
    }
  }

  template <int P>
  static void segment(const MomentsTileArgs& a, int64_t row, int64_t col, int64_t width,
                      uint32_t mask, float* columns) {
    const typename G::template Rows<P> grad(a, row, col);
    const Refs<P> at(*a.task, row, col);
    Sums<K> rows[P];
    for (int p = 0; p < P; ++p) {
      for (int q = 0; q < Q; ++q) rows[p].v[q] = zero();
    }
    int64_t c = 0;
    for (; c + kLanes <= width; c += kLanes) {
      step<P, false>(grad, at, c, kLanes, mask, rows, columns);
    }
    if (c < width) step<P, true>(grad, at, c, static_cast<int>(width - c), mask, rows, columns);
    if (!kSums) return;
    for (int p = 0; p < P; ++p) {
      double* out = a.row_out ? a.row_out + (row + p - a.row_begin) * Q : a.tensor_out;
      for (int q = 0; q < Q; ++q) out[q] += sum(rows[p].v[q]);
    }
  }

  static void flush(const MomentsTileArgs& a, float* columns, int64_t width) {
    double wide[kLanes];
    for (int q = 0; q < Q; ++q) {
      float* narrow = columns + q * kSegment;
      double* out = a.col_out + q * a.col_stride;
      int64_t c = 0;
      for (; c + kLanes <= width; c += kLanes) {
        add_to(out + c, load(narrow + c));
        store(narrow + c, zero());
      }
      if (c == width) continue;
      for (int i = 0; i < kLanes; ++i) wide[i] = 0;
      add_to(wide, load(narrow + c));
      for (int64_t i = c; i < width; ++i) out[i] += wide[i - c];
      store(narrow + c, zero());
    }
  }

  static void run(const MomentsTileArgs& a) {
    const uint32_t mask = a.problem->unsigned_dots ? 0x7fffffffu : 0xffffffffu;
    alignas(64) float columns[kColumns ? Q * kSegment : 1];
    const int64_t width = a.col_end - a.col_begin;
    if (kColumns) {
      for (int64_t i = 0; i < Q * kSegment; ++i) columns[i] = 0;
    }
    for (int64_t block = a.row_begin; block < a.row_end; block += kFlushRows) {
      const int64_t stop = block + kFlushRows < a.row_end ? block + kFlushRows : a.row_end;
      int64_t row = block;
      for (; row + G::kRows <= stop; row += G::kRows) segments<G::kRows>(a, row, mask, columns);
      for (; row < stop; ++row) segments<1>(a, row, mask, columns);
      if (kColumns) flush(a, columns, width);
    }
  }

  template <int P>
  static void segments(const MomentsTileArgs& a, int64_t row, uint32_t mask, float* columns) {
    for (int64_t col = a.col_begin; col < a.col_end; col += kSegment) {
      const int64_t left = a.col_end - col;
      segment<P>(a, row, col, left < kSegment ? left : kSegment, mask, columns);
    }
  }
};

template <class G, class R, int K>
void moments_by_axis(const MomentsTileArgs& a) {
  switch (a.problem->axis) {
    case Axis::tensor:
    case Axis::row: return Tile<G, R, K, true, false>::run(a);
    case Axis::column: return Tile<G, R, K, false, true>::run(a);
    case Axis::both: return Tile<G, R, K, true, true>::run(a);
  }
}

template <class G, class R>
void moments_by_refs(const MomentsTileArgs& a) {
  switch (a.problem->num_refs) {
    case 0: return moments_by_axis<G, R, 0>(a);
    case 1: return moments_by_axis<G, R, 1>(a);
    case 2: return moments_by_axis<G, R, 2>(a);
    case 3: return moments_by_axis<G, R, 3>(a);
    case 4: return moments_by_axis<G, R, 4>(a);
  }
}

template <class G>
void moments_by_ref_dtype(const MomentsTileArgs& a) {
  switch (a.problem->ref_dtype) {
    case DType::f32: return moments_by_refs<G, float>(a);
    case DType::bf16: return moments_by_refs<G, bf16>(a);
    case DType::f16: return moments_by_refs<G, f16>(a);
    case DType::f8: return moments_by_refs<G, f8>(a);
  }
}

void moments_tile(const MomentsTileArgs& a) {
  switch (a.problem->grad_dtype) {
    case DType::f32: return moments_by_ref_dtype<Stored<float>>(a);
    case DType::bf16: return moments_by_ref_dtype<Stored<bf16>>(a);
    case DType::f16: return moments_by_ref_dtype<Stored<f16>>(a);
    case DType::f8: return;  // a reference type only: the operators refuse it
  }
}

void factors_tile(const MomentsTileArgs& a) { moments_by_ref_dtype<Formed>(a); }

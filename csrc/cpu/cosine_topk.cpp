// Panels of cosine similarities, and the lists of the best rows they feed.
//
// Few queries: rows are read where they lie, sixteen at a time (cosine_rows_avx512.inl), unless one
// of them needs a scale.
//
// Else blocks of kCosineRows rows are packed once (float32, scaled, with their norms, in one read of
// memory; pairs of bfloat16 where those are exact) and meet every panel of queries while they stay in L2. A panel of scores is compared with
// each query's worst kept score; what is better enters a heap of keys (topk_key.h).
#include "gradsafe/cosine_topk.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "../common/cosine_scale.h"
#include "../common/tiling.h"
#include "../common/topk_key.h"
#include "isa.h"
#include "kernels.h"

namespace gradsafe {
namespace {

constexpr int64_t kVector = 16;
constexpr int64_t kPanelSize = kCosineRows * kCosinePanel;
static_assert(kCosineRows % kPanelRows == 0, "whole row tiles");

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The extra vector keeps rows of 2^n features out of each other's cache sets.
int64_t packed_stride(int64_t features) { return (ceil_div(features, kVector) + 1) * kVector; }

int64_t pair_words(int64_t features) { return ceil_div(features, 2); }
int64_t pair_stride(int64_t features) { return packed_stride(pair_words(features)); }

// Parts of one thread's scratch memory.
struct Scratch {
  double* sums;      // [kCosineRows][kCosinePanel]
  double* inverses;  // [kCosineRows]
  float* scores;     // [kCosineRows][kCosinePanel]
  float* packed;     // [kCosineRows][packed_stride]
  float* queries;    // [kCosineInPlace][packed_stride], each query by itself
  float* pairs;      // [kCosineRows][pair_stride]
};

Scratch divide(double* memory, int64_t features) {
  Scratch s;
  s.sums = memory;
  s.inverses = s.sums + kPanelSize;
  s.scores = reinterpret_cast<float*>(s.inverses + kCosineRows);
  s.packed = s.scores + kPanelSize;
  s.queries = s.packed + kCosineRows * packed_stride(features);
  s.pairs = s.queries + kCosineInPlace * packed_stride(features);
  return s;
}

bool needs_no_scale(uint32_t largest) {
  return is_finite_magnitude(largest) && float_of(cosine_scale_bits(largest)) == 1.0f;
}

// Writes one vector as scaled float32 and returns 1 / its norm: 0 for a zero vector, NaN for one
// that is not finite.
double pack_vector(const void* data, DType dtype, int64_t features, float* out) {
  const uint32_t largest = kernels().largest_magnitude(data, dtype, features);
  const bool finite = is_finite_magnitude(largest);
  const float scale = finite ? float_of(cosine_scale_bits(largest)) : 1.0f;
  const double squares = kernels().pack_scaled({data, dtype, features, scale, out});
  if (!finite) return std::numeric_limits<double>::quiet_NaN();
  return squares > 0 ? 1 / std::sqrt(squares) : 0;
}

const void* element(const void* data, DType dtype, int64_t index) {
  return static_cast<const char*>(data) + index * size_of(dtype);
}

// Rows up to the next whole row tile are zero.
void pack_rows(const CosineProblem& p, int64_t first, int64_t count, const Scratch& s) {
  const int64_t stride = packed_stride(p.features);
  for (int64_t i = 0; i < count; ++i) {
    const void* row = element(p.row_data, p.row_dtype, (first + i) * p.row_stride);
    s.inverses[i] = pack_vector(row, p.row_dtype, p.features, s.packed + i * stride);
  }
  for (int64_t i = count; i < ceil_div(count, kPanelRows) * kPanelRows; ++i) {
    std::fill_n(s.packed + i * stride, p.features, 0.0f);
    s.inverses[i] = 0;
  }
}

// Writes one bfloat16 vector as pairs; the smallest exponent field, 0 if pairs cannot serve.
int pack_pairs(const void* data, int64_t features, float* out, double* inverse) {
  const PackedPairs packed =
      kernels().cosine_pairs.pack(static_cast<const uint16_t*>(data), features, out);
  *inverse = packed.squares > 0 ? 1 / std::sqrt(packed.squares) : 0;
  return packed.largest == 0 || needs_no_scale(packed.largest) ? packed.smallest : 0;
}

// As pack_rows, but pairs, as long as they serve: the smallest exponent field, or 0.
int pack_row_pairs(const CosineProblem& p, int64_t first, int64_t count, const Scratch& s) {
  const int64_t stride = pair_stride(p.features);
  int least = 255;
  for (int64_t i = 0; i < count && least > 0; ++i) {
    const void* row = element(p.row_data, p.row_dtype, (first + i) * p.row_stride);
    least = std::min(least, pack_pairs(row, p.features, s.pairs + i * stride, s.inverses + i));
  }
  for (int64_t i = count; i < ceil_div(count, kPanelRows) * kPanelRows; ++i) {
    std::fill_n(s.pairs + i * stride, pair_words(p.features), 0.0f);
    s.inverses[i] = 0;
  }
  return least;
}

// Keys of one query: filled in any order up to k, from then on a heap with the worst in front.
struct BestRows {
  uint64_t* keys;
  int64_t k;

  void add(int64_t seen, uint64_t key) {
    if (seen < k) {
      keys[seen] = key;
      if (seen + 1 == k) std::make_heap(keys, keys + k, std::greater<>());
    } else if (key > keys[0]) {
      std::pop_heap(keys, keys + k, std::greater<>());
      keys[k - 1] = key;
      std::push_heap(keys, keys + k, std::greater<>());
    }
  }
};

// Offers rows [first, first + count) of a panel of scores to the lists of its queries. `seen` rows
// came before.
void select(const CosineProblem& p, const float* scores, int64_t first, int64_t count, int64_t seen,
            int64_t width, uint64_t* keys) {
  float worst[kCosinePanel];
  for (int64_t j = 0; j < width; ++j) {
    // Below every score while the list is not full.
    worst[j] = seen < p.k ? -2.0f : float_of(key_score_bits(keys[j * p.k]));
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      const float score = scores[i * kCosinePanel + j];
      if (score <= worst[j]) continue;  // NaN goes on; of equal scores the earlier row is kept
      BestRows best{keys + j * p.k, p.k};
      best.add(seen + i, topk_key(bits_of(score), static_cast<uint32_t>(first + i)));
      if (seen + i + 1 >= p.k) worst[j] = float_of(key_score_bits(best.keys[0]));
    }
  }
}

// Unpacks the queries of the first panel, each by itself; zeros behind the features.
void separate_queries(const CosineProblem& p, const CosineQueries& q, const Scratch& s) {
  const int64_t stride = packed_stride(p.features);
  for (int64_t j = 0; j < p.queries; ++j) {
    float* out = s.queries + j * stride;
    for (int64_t d = 0; d < p.features; ++d) out[d] = q.packed[d * kCosinePanel + j];
    std::fill(out + p.features, out + stride, 0.0f);
  }
}

// Scores of up to kCosineRows rows without packing them; false if one of them needs a scale.
bool score_in_place(const CosineProblem& p, const CosineQueries& q, int64_t first, int64_t count,
                    const Scratch& s) {
  double dots[kCosineInPlace * kVector], squares[kVector];
  uint32_t largest[kVector];
  for (int64_t begin = 0; begin < count; begin += kVector) {
    CosineRowsArgs args{};
    args.rows = element(p.row_data, p.row_dtype, (first + begin) * p.row_stride);
    args.dtype = p.row_dtype;
    args.row_stride = p.row_stride;
    args.count = std::min(kVector, count - begin);
    args.queries = s.queries;
    args.query_stride = packed_stride(p.features);
    args.num_queries = p.queries;
    args.features = p.features;
    args.dots = dots;
    args.squares = squares;
    args.largest = largest;
    kernels().cosine_rows(args);
    for (int64_t i = 0; i < args.count; ++i) {
      if (largest[i] != 0 && !needs_no_scale(largest[i])) return false;
      const double inverse = squares[i] > 0 ? 1 / std::sqrt(squares[i]) : 0;
      float* out = s.scores + (begin + i) * kCosinePanel;
      for (int64_t j = 0; j < p.queries; ++j) {
        // Rounding may carry a cosine past 1. NaN (of a damaged query) passes the comparisons.
        const float cosine = static_cast<float>(dots[j * kVector + i] * (inverse * q.inverses[j]));
        const float low = cosine < -1.0f ? -1.0f : cosine;
        out[j] = low > 1.0f ? 1.0f : low;
      }
    }
  }
  return true;
}

}  // namespace

bool cosine_topk_cpu_pairs(const CosineProblem& p) {
  return p.query_dtype == DType::bf16 && p.row_dtype == DType::bf16 && has_bf16_pairs();
}

int64_t cosine_topk_cpu_scratch(const CosineProblem& p) {
  const int64_t floats = kPanelSize +
                         (kCosineRows + kCosineInPlace) * packed_stride(p.features) +
                         kCosineRows * pair_stride(p.features);
  return kPanelSize + kCosineRows + ceil_div(floats, 2);
}

void cosine_topk_cpu_pack(const CosineProblem& p, int64_t panel, const CosineQueries& q,
                          double* scratch) {
  const Scratch s = divide(scratch, p.features);
  const int64_t stride = packed_stride(p.features);
  float* out = q.packed + panel * p.features * kCosinePanel;
  const bool pairs = cosine_topk_cpu_pairs(p);
  const int64_t words = pairs ? pair_words(p.features) : 0;
  float* out_pairs = q.pairs + panel * words * kCosinePanel;
  int least = pairs ? 255 : 0;
  for (int64_t begin = 0; begin < kCosinePanel; begin += kVector) {
    for (int64_t i = 0; i < kVector; ++i) {
      const int64_t query = panel * kCosinePanel + begin + i;
      double inverse = 0;
      if (query < p.queries) {
        const void* data = element(p.query_data, p.query_dtype, query * p.query_stride);
        float* row = s.pairs + i * pair_stride(p.features);
        if (pairs) least = std::min(least, pack_pairs(data, p.features, row, &inverse));
        inverse = pack_vector(data, p.query_dtype, p.features, s.packed + i * stride);
      } else {
        std::fill_n(s.pairs + i * pair_stride(p.features), words, 0.0f);
        std::fill_n(s.packed + i * stride, p.features, 0.0f);
      }
      q.inverses[query] = inverse;
    }
    for (int64_t d = 0; d < p.features; ++d) {
      for (int64_t i = 0; i < kVector; ++i) {
        out[d * kCosinePanel + begin + i] = s.packed[i * stride + d];
      }
    }
    for (int64_t w = 0; w < words && least > 0; ++w) {
      for (int64_t i = 0; i < kVector; ++i) {
        out_pairs[w * kCosinePanel + begin + i] = s.pairs[i * pair_stride(p.features) + w];
      }
    }
  }
  q.exponents[panel] = least;
}

void cosine_topk_cpu_segment(const CosineProblem& p, const CosineQueries& q, int64_t begin,
                             int64_t end, double* scratch, uint64_t* keys) {
  const Scratch s = divide(scratch, p.features);
  const bool in_place = p.queries <= kCosineInPlace && kernels().cosine_rows != nullptr;
  const bool pairs = cosine_topk_cpu_pairs(p);
  if (in_place) separate_queries(p, q, s);
  for (int64_t first = begin; first < end; first += kCosineRows) {
    const int64_t count = std::min(kCosineRows, end - first);
    if (in_place && score_in_place(p, q, first, count, s)) {
      select(p, s.scores, first, count, first - begin, p.queries, keys);
      continue;
    }
    const int least = pairs ? pack_row_pairs(p, first, count, s) : 0;
    bool packed = false;
    for (int64_t panel = 0; panel < cosine_panels(p.queries); ++panel) {
      const int64_t query = panel * kCosinePanel;
      const int64_t width = std::min(kCosinePanel, p.queries - query);
      const bool exact = pairs_are_exact(least, q.exponents[panel]);
      if (!exact && !packed) {
        pack_rows(p, first, count, s);
        packed = true;
      }
      CosinePanelArgs args{};
      args.rows = exact ? s.pairs : s.packed;
      args.row_stride = exact ? pair_stride(p.features) : packed_stride(p.features);
      args.row_tiles = ceil_div(count, kPanelRows);
      args.features = exact ? pair_words(p.features) : p.features;
      args.queries = (exact ? q.pairs : q.packed) + query * args.features;
      args.vectors = ceil_div(width, kVector);
      args.row_inverses = s.inverses;
      args.query_inverses = q.inverses + query;
      args.sums = s.sums;
      args.scores = s.scores;
      (exact ? kernels().cosine_pairs.panel : kernels().cosine_panel)(args);
      select(p, s.scores, first, count, first - begin, width, keys + query * p.k);
    }
  }
}

void cosine_topk_cpu_finish(const CosineProblem& p, uint64_t* keys, int64_t count, float* scores,
                            int64_t* indices) {
  std::partial_sort(keys, keys + p.k, keys + count, std::greater<>());
  for (int64_t i = 0; i < p.k; ++i) {
    scores[i] = float_of(key_score_bits(keys[i]));
    indices[i] = p.start + key_row(keys[i]);
  }
}

}  // namespace gradsafe

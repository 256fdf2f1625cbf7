// Scores of a slab of rows, of which only those are kept that can still reach a list.
//
// A score is written, and its bit set, if its key is above the worst of the query's best so far. The
// place of a score depends on its row only, so that the order of blocks and threads does not show.
#pragma once

#include "../../common/topk_key.h"
#include "reduce.cuh"

namespace gradsafe {

constexpr int kMaskBits = 32;  // rows whose bits share a word

struct ScoreSlab {
  float* scores;          // [queries][stride]; only those whose bits are set
  uint32_t* masks;        // [queries][stride / kMaskBits], up to ceil(rows / kMaskBits)
  int64_t stride;         // a multiple of the tile
  const uint64_t* best;   // [queries][k], best first
  int32_t k;
  bool filter;            // k rows came before the slab
  uint32_t first_row;     // of the slab
  const double *query_inverses, *row_inverses;  // of scaled vectors: 1 / norm, 0 or NaN
};

// Rounding may carry a cosine past 1. NaN fails both comparisons and stays.
__device__ inline float cosine_score(double total, double inverse) {
  const float cosine = static_cast<float>(total * inverse);
  const float low = cosine < -1.0f ? -1.0f : cosine;
  return low > 1.0f ? 1.0f : low;
}

// What a query's scores must exceed.
class Threshold {
 public:
  __device__ Threshold(const ScoreSlab& slab, int64_t query)
      : key_(slab.filter ? slab.best[query * slab.k + slab.k - 1] : 0), score_(-2.0f) {
    if (slab.filter) score_ = __uint_as_float(key_score_bits(key_)) - kMargin;
  }

  // Whether a score known to about 2^-21 may pass. NaN on either side does.
  __device__ bool may_pass(float estimate) const { return !(estimate < score_); }
  __device__ bool passes(float score, uint32_t row) const {
    return topk_key(__float_as_uint(score), row) > key_;
  }

 private:
  static constexpr float kMargin = 0x1p-19f;
  uint64_t key_;
  float score_;
};

}  // namespace gradsafe

// The k rows with the largest cosine similarity to each query, while streaming over the rows.
//
//   cos(q, r) = sum_d q_d r_d / (|q| |r|), 0 if q or r is zero, NaN if q or r is not finite
//
// Best first: NaN before every number, then larger scores, then smaller rows. A score is rounded to
// float32 before it is ranked, so lists of parts of the rows merge into the list of the whole.
#pragma once

#include "gradsafe/types.h"

namespace gradsafe {

constexpr int64_t kMaxTopk = 1024;

struct CosineProblem {
  DType query_dtype, row_dtype;
  int64_t queries, rows, features;  // Q, N (below 2^31), D
  int64_t k;                        // at most kMaxTopk and N
  int64_t start;                    // index of the first row
  const void* query_data;  // element (i, d) at query_data[i * query_stride + d]
  const void* row_data;
  int64_t query_stride, row_stride;
};

// ---- CPU -------------------------------------------------------------------------------------
// Queries are handled in groups of at most kCosineGroup. Each group is packed once, and any number
// of threads then walk over segments of the rows, each keeping a list of its own.
constexpr int64_t kCosineGroup = 1024;
constexpr int64_t kCosinePanel = 64;  // queries that one panel of scores holds
constexpr int64_t kCosineRows = 48;   // rows of a panel

struct CosineQueries {
  float* packed;     // [panels][D][kCosinePanel]
  double* inverses;  // [panels][kCosinePanel]: 1 / |q|
  // bfloat16 queries and rows on a processor that multiplies pairs (kernels.h), else unused:
  float* pairs;        // [panels][ceil(D / 2)][kCosinePanel]
  int32_t* exponents;  // [panels]: the smallest exponent field, 0 if pairs cannot serve
};
constexpr int64_t cosine_panels(int64_t queries) {
  return (queries + kCosinePanel - 1) / kCosinePanel;
}
bool cosine_topk_cpu_pairs(const CosineProblem& problem);       // true if `pairs` is used
int64_t cosine_topk_cpu_scratch(const CosineProblem& problem);  // float64 elements per thread
void cosine_topk_cpu_pack(const CosineProblem& problem, int64_t panel, const CosineQueries& queries,
                          double* scratch);
// Best rows of [begin, end) for every query: keys [Q][k], of which min(k, end - begin) are filled.
void cosine_topk_cpu_segment(const CosineProblem& problem, const CosineQueries& queries,
                             int64_t begin, int64_t end, double* scratch, uint64_t* keys);
// Joins `count` candidates of one query, in any order: scores [k] and indices [k]. Reorders them.
void cosine_topk_cpu_finish(const CosineProblem& problem, uint64_t* keys, int64_t count,
                            float* scores, int64_t* indices);

// ---- CUDA ------------------------------------------------------------------------------------
struct CosineCudaCall {
  CosineProblem problem;
  float* scores;     // [Q][k]
  int64_t* indices;  // [Q][k]
  void* workspace;   // cosine_topk_cuda_workspace() bytes, 16-byte aligned
  void* stream;
};
int64_t cosine_topk_cuda_workspace(const CosineProblem& problem);
Status cosine_topk_cuda(const CosineCudaCall& call);

}  // namespace gradsafe

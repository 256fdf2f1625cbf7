// Entry "cosine_topk". Integers: dtype of the queries, dtype of the rows, Q, N, D, k, start, strides
// of queries and rows. Buffers: queries, rows. Outputs: float32 scores, int64 indices.
#include "gradsafe/cosine_topk.h"

#include "cases.h"

namespace emulated {
namespace {

gradsafe::Status run_cosine_topk(Case& c) {
  gradsafe::CosineCudaCall call{};
  gradsafe::CosineProblem& p = call.problem;
  p.query_dtype = static_cast<gradsafe::DType>(c.integer());
  p.row_dtype = static_cast<gradsafe::DType>(c.integer());
  p.queries = c.integer();
  p.rows = c.integer();
  p.features = c.integer();
  p.k = c.integer();
  p.start = c.integer();
  p.query_stride = c.integer();
  p.row_stride = c.integer();
  p.query_data = c.input();
  p.row_data = c.input();
  call.scores = static_cast<float*>(c.output(p.queries * p.k * 4));
  call.indices = static_cast<int64_t*>(c.output(p.queries * p.k * 8));
  call.workspace = c.workspace(gradsafe::cosine_topk_cuda_workspace(p));
  return gradsafe::cosine_topk_cuda(call);
}

const Entry entry("cosine_topk", &run_cosine_topk);

}  // namespace
}  // namespace emulated

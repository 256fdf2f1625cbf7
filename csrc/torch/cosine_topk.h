// The argument side of gradsafe::cosine_topk, shared by its CPU and CUDA operators.
#pragma once

#include "checks.h"
#include "gradsafe/cosine_topk.h"

namespace gradsafe {

inline CosineProblem parse_cosine_topk(const Tensor& queries, const Tensor& rows, int64_t k,
                                       int64_t start) {
  constexpr const char* op = "cosine_topk";
  GRADSAFE_CHECK(queries.dim() == 2, op, ": expected queries of shape [Q, D], got ",
                 shape_text(queries));
  GRADSAFE_CHECK(rows.dim() == 2 && rows.size(1) == queries.size(1), op,
                 ": expected rows of shape [N, D] with D = ", queries.size(1), " like queries, got ",
                 shape_text(rows));
  check_same_device(rows, queries, op, "rows");
  GRADSAFE_CHECK(k >= 0 && k <= kMaxTopk, op, ": expected k between 0 and ", kMaxTopk, ", got ", k);
  GRADSAFE_CHECK(k <= rows.size(0), op, ": expected k at most N = ", rows.size(0), ", got ", k);
  GRADSAFE_CHECK(start >= 0, op, ": expected start of at least 0, got ", start);
  GRADSAFE_CHECK(rows.size(0) <= INT32_MAX, op, ": expected N below 2^31, got ", rows.size(0));
  CosineProblem p{};
  p.query_dtype = dtype_of(queries, op, "queries");
  p.row_dtype = dtype_of(rows, op, "rows");
  p.queries = queries.size(0);
  p.rows = rows.size(0);
  p.features = queries.size(1);
  p.k = k;
  p.start = start;
  p.query_data = queries.const_data_ptr();
  p.row_data = rows.const_data_ptr();
  p.query_stride = row_stride(queries, op, "queries");
  p.row_stride = row_stride(rows, op, "rows");
  return p;
}

}  // namespace gradsafe

// The argument side of gradsafe::wgrad_moments, shared by its CPU and CUDA operators.
#pragma once

#include <utility>
#include <vector>

#include "checks.h"
#include "gradsafe/wgrad_moments.h"

namespace gradsafe {

using IntList = torch::headeronly::HeaderOnlyArrayRef<int64_t>;

struct WgradArguments {
  WgradProblem problem{};
  std::vector<int64_t> starts, lengths, experts;
  int64_t rows = 0;        // of x and dy
  int64_t per_sample = 0;  // results of one sample, float64 elements
};

// The arguments with the lists of their samples tied to the problem.
inline WgradArguments with_samples(WgradArguments a, const char* op, int64_t rows) {
  GRADSAFE_CHECK(rows <= INT32_MAX, op, ": expected fewer than 2^31 rows of x, got ", rows);
  a.rows = rows;
  a.problem.samples = static_cast<int64_t>(a.lengths.size());
  a.problem.starts = a.starts.data();
  a.problem.lengths = a.lengths.data();
  a.problem.experts = a.experts.empty() ? nullptr : a.experts.data();
  return a;
}

// Stride between the tokens of a [B, T, features] tensor that is one matrix [B * T, features].
inline int64_t token_stride(const Tensor& tensor, const char* op, const std::string& name) {
  const int64_t samples = tensor.size(0), tokens = tensor.size(1), features = tensor.size(2);
  const int64_t stride = tokens > 1 ? tensor.stride(1) : samples > 1 ? tensor.stride(0) : features;
  const bool fits = tensor.numel() == 0 ||
                    ((features <= 1 || tensor.stride(2) == 1) &&
                     (samples <= 1 || tensor.stride(0) == tokens * stride));
  GRADSAFE_CHECK(fits, op, ": expected ", name, " to be rows of one matrix; call .contiguous()");
  return stride;
}

inline std::vector<int64_t> to_vector(IntList list) { return {list.begin(), list.end()}; }

// What both operators have in common. `experts` is how many matrices a reference holds, or -1 for a
// single one without that dimension.
inline WgradArguments parse_wgrad(const char* op, const Tensor& x, const Tensor& dy,
                                  const std::vector<Tensor>& refs, int64_t experts, int64_t axis,
                                  bool unsigned_dots) {
  check_same_device(dy, x, op, "dy");
  GRADSAFE_CHECK(axis >= 0 && axis <= 3, op, ": unknown axis code ", axis);
  GRADSAFE_CHECK(refs.size() <= static_cast<size_t>(kMaxRefs), op, ": expected 0 to ", kMaxRefs,
                 " references, got ", refs.size());
  WgradArguments a;
  WgradProblem& p = a.problem;
  p.dtype = dtype_of(x, op, "x");
  GRADSAFE_CHECK(dtype_of(dy, op, "dy") == p.dtype, op, ": expected dy of the dtype of x");
  p.ref_dtype = p.dtype;
  p.axis = static_cast<Axis>(axis);
  p.num_refs = static_cast<int32_t>(refs.size());
  p.unsigned_dots = unsigned_dots;
  p.in_features = x.size(x.dim() - 1);
  p.out_features = dy.size(dy.dim() - 1);
  p.x = x.const_data_ptr();
  p.dy = dy.const_data_ptr();
  std::vector<int64_t> shape{p.out_features, p.in_features};
  if (experts >= 0) shape.insert(shape.begin(), experts);
  for (size_t k = 0; k < refs.size(); ++k) {
    const Name name = item("refs", k);
    const Tensor& ref = refs[k];
    GRADSAFE_CHECK(shape_of(ref) == shape, op, ": expected ", name, " of shape ", list_text(shape),
                   ", got ", shape_text(ref));
    check_same_device(ref, x, op, name);
    const DType dtype = ref_dtype_of(ref, op, name);
    if (k == 0) p.ref_dtype = dtype;
    GRADSAFE_CHECK(dtype == p.ref_dtype, op, ": expected ", name, " of the dtype of refs[0]");
    p.refs[k] = ref.const_data_ptr();
    p.ref_strides[k] = row_stride(ref, op, name);
    p.expert_strides[k] = experts >= 0 ? ref.stride(0) : 0;
  }
  a.per_sample = moments_out_size(p.axis, p.num_refs, p.out_features, p.in_features);
  return a;
}

inline WgradArguments parse_wgrad_moments(const Tensor& x, const Tensor& dy,
                                          const std::vector<Tensor>& refs,
                                          const std::vector<int64_t>& lengths, int64_t axis,
                                          bool unsigned_dots) {
  constexpr const char* op = "wgrad_moments";
  GRADSAFE_CHECK(x.dim() == 3, op, ": expected x of shape [B, T, I], got ", shape_text(x));
  GRADSAFE_CHECK(dy.dim() == 3 && dy.size(0) == x.size(0) && dy.size(1) == x.size(1), op,
                 ": expected dy of shape [B, T, O] like x ", shape_text(x), ", got ",
                 shape_text(dy));
  WgradArguments a = parse_wgrad(op, x, dy, refs, -1, axis, unsigned_dots);
  WgradProblem& p = a.problem;
  p.x_stride = token_stride(x, op, "x");
  p.dy_stride = token_stride(dy, op, "dy");
  const int64_t samples = x.size(0), tokens = x.size(1);
  GRADSAFE_CHECK(lengths.empty() || static_cast<int64_t>(lengths.size()) == samples, op,
                 ": expected one length for each of ", samples, " samples, got ", lengths.size());
  for (int64_t b = 0; b < samples; ++b) {
    const int64_t length = lengths.empty() ? tokens : lengths[b];
    GRADSAFE_CHECK(length >= 0 && length <= tokens, op, ": expected ", item("lengths", b),
                   " between 0 and T = ", tokens, ", got ", length);
    a.starts.push_back(b * tokens);
    a.lengths.push_back(length);
  }
  return with_samples(std::move(a), op, samples * tokens);
}

inline WgradArguments parse_grouped_wgrad_moments(const Tensor& x, const Tensor& dy,
                                                  const std::vector<Tensor>& refs,
                                                  const std::vector<int64_t>& lengths,
                                                  const std::vector<int64_t>& experts, int64_t axis,
                                                  bool unsigned_dots) {
  constexpr const char* op = "grouped_wgrad_moments";
  GRADSAFE_CHECK(x.dim() == 2, op, ": expected x of shape [N, I], got ", shape_text(x));
  GRADSAFE_CHECK(dy.dim() == 2 && dy.size(0) == x.size(0), op,
                 ": expected dy of shape [N, O] like x ", shape_text(x), ", got ", shape_text(dy));
  GRADSAFE_CHECK(refs.empty() || refs[0].dim() == 3, op,
                 ": expected refs[0] of shape [E, O, I], got ", shape_text(refs[0]));
  const int64_t matrices = refs.empty() ? INT64_MAX : refs[0].size(0);
  WgradArguments a = parse_wgrad(op, x, dy, refs, matrices, axis, unsigned_dots);
  WgradProblem& p = a.problem;
  p.x_stride = row_stride(x, op, "x");
  p.dy_stride = row_stride(dy, op, "dy");
  GRADSAFE_CHECK(experts.size() == lengths.size(), op, ": expected one expert for each of ",
                 lengths.size(), " segments, got ", experts.size());
  int64_t rows = 0;
  for (size_t s = 0; s < lengths.size(); ++s) {
    const int64_t segment = static_cast<int64_t>(s);
    GRADSAFE_CHECK(lengths[s] >= 0 && lengths[s] <= x.size(0) - rows, op, ": expected ",
                   item("lengths", segment), " between 0 and the ", x.size(0) - rows,
                   " rows that are left, got ", lengths[s]);
    GRADSAFE_CHECK(experts[s] >= 0 && experts[s] < matrices, op, ": expected ",
                   item("experts", segment), " between 0 and ", matrices - 1, ", got ", experts[s]);
    a.starts.push_back(rows);
    rows += lengths[s];
  }
  GRADSAFE_CHECK(rows == x.size(0), op, ": expected lengths that add up to N = ", x.size(0),
                 ", got ", rows);
  a.lengths = lengths;
  a.experts = experts;
  return with_samples(std::move(a), op, rows);
}

}  // namespace gradsafe

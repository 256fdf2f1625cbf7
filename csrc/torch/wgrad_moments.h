// The argument side of gradsafe::wgrad_moments, shared by its CPU and CUDA operators.
#pragma once

#include <vector>

#include "checks.h"
#include "gradsafe/wgrad_moments.h"

namespace gradsafe {

using IntList = torch::headeronly::HeaderOnlyArrayRef<int64_t>;

struct WgradArguments {
  WgradProblem problem{};
  std::vector<int64_t> starts, lengths;
  int64_t per_sample = 0;  // results of one sample, float64 elements
};

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

inline WgradArguments parse_wgrad_moments(const Tensor& x, const Tensor& dy,
                                          const std::vector<Tensor>& refs,
                                          const std::vector<int64_t>& lengths, int64_t axis,
                                          bool unsigned_dots) {
  constexpr const char* op = "wgrad_moments";
  GRADSAFE_CHECK(x.dim() == 3, op, ": expected x of shape [B, T, I], got ", shape_text(x));
  GRADSAFE_CHECK(dy.dim() == 3 && dy.size(0) == x.size(0) && dy.size(1) == x.size(1), op,
                 ": expected dy of shape [B, T, O] like x ", shape_text(x), ", got ",
                 shape_text(dy));
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
  p.samples = x.size(0);
  p.in_features = x.size(2);
  p.out_features = dy.size(2);
  p.x = x.const_data_ptr();
  p.dy = dy.const_data_ptr();
  p.x_stride = token_stride(x, op, "x");
  p.dy_stride = token_stride(dy, op, "dy");
  for (size_t k = 0; k < refs.size(); ++k) {
    const std::string name = item("refs", static_cast<int64_t>(k));
    const Tensor& ref = refs[k];
    GRADSAFE_CHECK(ref.dim() == 2 && ref.size(0) == p.out_features && ref.size(1) == p.in_features,
                   op, ": expected ", name, " of shape [", p.out_features, ", ", p.in_features,
                   "], got ", shape_text(ref));
    check_same_device(ref, x, op, name);
    const DType dtype = ref_dtype_of(ref, op, name);
    if (k == 0) p.ref_dtype = dtype;
    GRADSAFE_CHECK(dtype == p.ref_dtype, op, ": expected ", name, " of the dtype of refs[0]");
    p.refs[k] = ref.const_data_ptr();
    p.ref_strides[k] = row_stride(ref, op, name);
  }
  const int64_t tokens = x.size(1);
  GRADSAFE_CHECK(p.samples * tokens <= INT32_MAX, op, ": expected B * T below 2^31, got ",
                 p.samples * tokens);
  GRADSAFE_CHECK(lengths.empty() || static_cast<int64_t>(lengths.size()) == p.samples, op,
                 ": expected one length for each of ", p.samples, " samples, got ",
                 lengths.size());
  for (int64_t b = 0; b < p.samples; ++b) {
    const int64_t length = lengths.empty() ? tokens : lengths[b];
    GRADSAFE_CHECK(length >= 0 && length <= tokens, op, ": expected ", item("lengths", b),
                   " between 0 and T = ", tokens, ", got ", length);
    a.starts.push_back(b * tokens);
    a.lengths.push_back(length);
  }
  p.starts = a.starts.data();
  p.lengths = a.lengths.data();
  a.per_sample = moments_out_size(p.axis, p.num_refs, p.out_features, p.in_features);
  return a;
}

}  // namespace gradsafe

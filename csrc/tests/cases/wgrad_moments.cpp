// Entry "wgrad_moments". Integers: dtype of x and dy, dtype of the references, axis, K, unsigned,
// samples, O, I; row strides of x, of dy and of each reference; starts; lengths; whether there are
// experts, and if so, the stride between those of each reference, and each sample's. Buffers: x,
// dy, references. Output: float64 results, sample after sample.
#include "gradsafe/wgrad_moments.h"

#include "cases.h"

namespace emulated {
namespace {

gradsafe::Status run_wgrad_moments(Case& c) {
  gradsafe::WgradCudaCall call{};
  gradsafe::WgradProblem& p = call.problem;
  p.dtype = static_cast<gradsafe::DType>(c.integer());
  p.ref_dtype = static_cast<gradsafe::DType>(c.integer());
  p.axis = static_cast<gradsafe::Axis>(c.integer());
  p.num_refs = static_cast<int32_t>(c.integer());
  p.unsigned_dots = c.integer() != 0;
  p.samples = c.integer();
  p.out_features = c.integer();
  p.in_features = c.integer();
  p.x_stride = c.integer();
  p.dy_stride = c.integer();
  for (int k = 0; k < p.num_refs; ++k) p.ref_strides[k] = c.integer();
  std::vector<int64_t> starts(static_cast<std::size_t>(p.samples)), lengths(starts.size()),
      experts(starts.size());
  for (int64_t& start : starts) start = c.integer();
  for (int64_t& length : lengths) length = c.integer();
  if (c.integer() != 0) {
    for (int k = 0; k < p.num_refs; ++k) p.expert_strides[k] = c.integer();
    for (int64_t& expert : experts) expert = c.integer();
    p.experts = experts.data();
  }
  p.starts = starts.data();
  p.lengths = lengths.data();
  p.x = c.input();
  p.dy = c.input();
  for (int k = 0; k < p.num_refs; ++k) p.refs[k] = c.input();
  const int64_t results =
      gradsafe::moments_out_size(p.axis, p.num_refs, p.out_features, p.in_features);
  call.out = static_cast<double*>(c.output(p.samples * results * 8));
  int64_t bytes = 0;
  const gradsafe::Status status = gradsafe::wgrad_moments_cuda_workspace(p, bytes);
  if (!status.ok()) return status;
  call.workspace = c.workspace(bytes);
  return gradsafe::wgrad_moments_cuda(call);
}

const Entry entry("wgrad_moments", &run_wgrad_moments);

}  // namespace
}  // namespace emulated

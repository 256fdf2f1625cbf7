// CUDA kernels of the operators. Compiled with the host compiler; no CUDA header is needed.
#include <tuple>

#include "cosine_topk.h"
#include "cuda_launch.h"
#include "kl_divergence.h"
#include "moments.h"
#include "wgrad_moments.h"

namespace gradsafe {
namespace {

Tensor moments(std::vector<Tensor> grads, std::vector<Tensor> refs, int64_t num_refs, int64_t axis,
               bool unsigned_dots) {
  const MomentsCall call = parse_moments(grads, refs, num_refs, axis, unsigned_dots);
  GRADSAFE_CHECK(!grads.empty(), "moments: expected at least one gradient");
  const torch::stable::accelerator::DeviceGuard guard(grads[0].get_device_index());
  const int64_t num_tasks = static_cast<int64_t>(call.tasks.size());
  // Workspace comes from torch's caching allocator, which knows about streams and graph capture.
  const int64_t bytes = moments_cuda_workspace(call.problem, call.tasks.data(), num_tasks);
  Tensor out =
      torch::stable::new_empty(grads[0], {call.out_offsets[num_tasks]}, ScalarType::Double);
  Tensor workspace = torch::stable::new_empty(grads[0], {bytes / 4}, ScalarType::Float);

  MomentsCudaCall launch{};
  launch.problem = call.problem;
  launch.tasks = call.tasks.data();
  launch.num_tasks = num_tasks;
  launch.out = static_cast<double*>(out.mutable_data_ptr());
  launch.out_offsets = call.out_offsets.data();
  launch.workspace = workspace.mutable_data_ptr();
  launch.stream = current_stream(grads[0].get_device_index());
  check_status(moments_cuda(launch), "moments");
  return out;
}

Tensor run_wgrad_moments(const WgradArguments& a, const Tensor& x, const char* op) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  int64_t bytes = 0;
  check_status(wgrad_moments_cuda_workspace(a.problem, bytes), op);
  Tensor out = torch::stable::new_empty(x, {a.problem.samples, a.per_sample}, ScalarType::Double);
  Tensor workspace = torch::stable::new_empty(x, {(bytes + 3) / 4}, ScalarType::Float);

  WgradCudaCall launch{};
  launch.problem = a.problem;
  launch.out = static_cast<double*>(out.mutable_data_ptr());
  launch.workspace = workspace.mutable_data_ptr();
  launch.stream = current_stream(x.get_device_index());
  check_status(wgrad_moments_cuda(launch), op);
  return out;
}

Tensor wgrad_moments(Tensor x, Tensor dy, std::vector<Tensor> refs, IntList lengths, int64_t axis,
                     bool unsigned_dots) {
  const WgradArguments arguments =
      parse_wgrad_moments(x, dy, refs, to_vector(lengths), axis, unsigned_dots);
  return run_wgrad_moments(arguments, x, "wgrad_moments");
}

Tensor grouped_wgrad_moments(Tensor x, Tensor dy, std::vector<Tensor> refs, IntList lengths,
                             IntList experts, int64_t axis, bool unsigned_dots) {
  const WgradArguments arguments = parse_grouped_wgrad_moments(
      x, dy, refs, to_vector(lengths), to_vector(experts), axis, unsigned_dots);
  return run_wgrad_moments(arguments, x, "grouped_wgrad_moments");
}

std::tuple<Tensor, Tensor> cosine_topk(Tensor queries, Tensor rows, int64_t k, int64_t start) {
  CosineCudaCall launch{};
  launch.problem = parse_cosine_topk(queries, rows, k, start);
  const torch::stable::accelerator::DeviceGuard guard(queries.get_device_index());
  Tensor scores = torch::stable::new_empty(queries, {queries.size(0), k}, ScalarType::Float);
  Tensor indices = torch::stable::new_empty(queries, {queries.size(0), k}, ScalarType::Long);
  const int64_t bytes = cosine_topk_cuda_workspace(launch.problem);
  Tensor workspace = torch::stable::new_empty(queries, {(bytes + 7) / 8}, ScalarType::Double);
  launch.scores = static_cast<float*>(scores.mutable_data_ptr());
  launch.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  launch.workspace = workspace.mutable_data_ptr();
  launch.stream = current_stream(queries.get_device_index());
  check_status(cosine_topk_cuda(launch), "cosine_topk");
  return {scores, indices};
}

Tensor run_kl_divergence(KlProblem problem, const Tensor& student, const char* op) {
  const torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  Tensor out = torch::stable::new_empty(student, {problem.rows}, ScalarType::Float);
  problem.out = static_cast<float*>(out.mutable_data_ptr());
  check_status(kl_divergence_cuda(problem, current_stream(student.get_device_index())), op);
  return out;
}

Tensor kl_divergence(Tensor student, Tensor teacher) {
  constexpr const char* op = "kl_divergence";
  return run_kl_divergence(parse_kl(op, student, teacher), student, op);
}

Tensor kl_divergence_(Tensor student, Tensor teacher, Tensor weight) {
  return run_kl_divergence(parse_kl_in_place(student, teacher, weight), student, "kl_divergence_");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gradsafe, CUDA, m) {
  m.impl("moments", TORCH_BOX(&moments));
  m.impl("wgrad_moments", TORCH_BOX(&wgrad_moments));
  m.impl("grouped_wgrad_moments", TORCH_BOX(&grouped_wgrad_moments));
  m.impl("cosine_topk", TORCH_BOX(&cosine_topk));
  m.impl("kl_divergence", TORCH_BOX(&kl_divergence));
  m.impl("kl_divergence_", TORCH_BOX(&kl_divergence_));
}

}  // namespace gradsafe

// CUDA kernels of gradient surgery. Compiled with the host compiler; no CUDA header is needed.
#include "cuda_launch.h"
#include "surgery.h"

namespace gradsafe {
namespace {

SurgeryCudaCall call_of(const std::vector<SurgeryTask>& tasks, int64_t num_groups,
                        const Tensor& like) {
  return {tasks.data(), static_cast<int64_t>(tasks.size()), num_groups,
          current_stream(like.get_device_index())};
}

Tensor compute_sums(const char* op, const std::vector<SurgeryTask>& tasks, int64_t num_groups,
                    const Tensor& like) {
  const SurgeryCudaCall call = call_of(tasks, num_groups, like);
  // Workspace comes from torch's caching allocator, which knows about streams and graph capture.
  const int64_t bytes = surgery_cuda_workspace(call.tasks, call.num_tasks);
  Tensor sums = torch::stable::new_empty(like, {num_groups, kSurgerySums}, ScalarType::Double);
  Tensor workspace = torch::stable::new_empty(like, {bytes / 8}, ScalarType::Double);
  check_status(surgery_cuda_sums(call, workspace.mutable_data_ptr(),
                                 static_cast<double*>(sums.mutable_data_ptr())),
               op);
  return sums;
}

Tensor merge(const char* op, const std::vector<SurgeryTask>& tasks, const Tensor& sums,
             double rho) {
  const int64_t groups = sums.size(0);
  Tensor out = torch::stable::new_empty(sums, {groups, kSurgeryResults}, ScalarType::Double);
  check_status(surgery_cuda_merge(call_of(tasks, groups, sums),
                                  static_cast<const double*>(sums.const_data_ptr()), rho,
                                  static_cast<double*>(out.mutable_data_ptr())),
               op);
  return out;
}

Tensor surgery_sums(std::vector<Tensor> user, std::vector<Tensor> align, IntList groups,
                    int64_t num_groups) {
  constexpr const char* op = "surgery_sums";
  Extents extents;
  const std::vector<SurgeryTask> tasks =
      parse_surgery(op, user, align, groups, num_groups, false, extents);
  GRADSAFE_CHECK(!user.empty(), op, ": expected at least one tensor");
  const torch::stable::accelerator::DeviceGuard guard(user[0].get_device_index());
  return compute_sums(op, tasks, num_groups, user[0]);
}

Tensor surgery_merge(std::vector<Tensor> user, std::vector<Tensor> align, Tensor sums, double rho,
                     IntList groups) {
  constexpr const char* op = "surgery_merge_";
  Extents extents;
  const int64_t num_groups = parse_sums(op, sums);
  const std::vector<SurgeryTask> tasks =
      parse_surgery(op, user, align, groups, num_groups, true, extents);
  extents.check(op);
  if (!user.empty()) check_same_device(sums, user[0], op, "sums");
  const torch::stable::accelerator::DeviceGuard guard(sums.get_device_index());
  return merge(op, tasks, sums, rho);
}

Tensor surgery(std::vector<Tensor> user, std::vector<Tensor> align, double rho, IntList groups,
               int64_t num_groups) {
  constexpr const char* op = "surgery_";
  Extents extents;
  const std::vector<SurgeryTask> tasks =
      parse_surgery(op, user, align, groups, num_groups, true, extents);
  GRADSAFE_CHECK(!user.empty(), op, ": expected at least one tensor");
  extents.check(op);
  const torch::stable::accelerator::DeviceGuard guard(user[0].get_device_index());
  return merge(op, tasks, compute_sums(op, tasks, num_groups, user[0]), rho);
}

Tensor surgery_adamw(std::vector<Tensor> params, std::vector<Tensor> user,
                     std::vector<Tensor> align, std::vector<Tensor> exp_avg,
                     std::vector<Tensor> exp_avg_sq, std::vector<Tensor> steps,
                     std::optional<Tensor> given_sums, double rho, double lr, double beta1,
                     double beta2, double eps, double weight_decay, IntList groups,
                     int64_t num_groups) {
  constexpr const char* op = "surgery_adamw_";
  const SurgeryAdamwCall call = parse_surgery_adamw(params, user, align, exp_avg, exp_avg_sq,
                                                    steps, groups, num_groups);
  const torch::stable::accelerator::DeviceGuard guard(params[0].get_device_index());
  const Tensor sums =
      given_sums ? *given_sums : compute_sums(op, call.pairs, num_groups, params[0]);
  GRADSAFE_CHECK(parse_sums(op, sums) == num_groups, op, ": expected sums of ", num_groups,
                 " groups, got ", sums.size(0));
  check_same_device(sums, params[0], op, "sums");
  Tensor out =
      torch::stable::new_empty(sums, {num_groups, kSurgeryResults}, ScalarType::Double);

  SurgeryAdamwCudaCall launch{};
  launch.tasks = call.tasks.data();
  launch.num_tasks = static_cast<int64_t>(call.tasks.size());
  launch.steps = call.steps.data();
  launch.num_steps = static_cast<int64_t>(call.steps.size());
  launch.num_groups = num_groups;
  launch.options = {lr, beta1, beta2, eps, weight_decay};
  launch.rho = rho;
  launch.sums = static_cast<const double*>(sums.const_data_ptr());
  launch.out = static_cast<double*>(out.mutable_data_ptr());
  launch.stream = current_stream(params[0].get_device_index());
  check_status(surgery_adamw_cuda(launch), op);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gradsafe, CUDA, m) {
  m.impl("surgery_sums", TORCH_BOX(&surgery_sums));
  m.impl("surgery_merge_", TORCH_BOX(&surgery_merge));
  m.impl("surgery_", TORCH_BOX(&surgery));
  m.impl("surgery_adamw_", TORCH_BOX(&surgery_adamw));
}

}  // namespace gradsafe

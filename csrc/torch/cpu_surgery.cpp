// CPU kernels of gradient surgery: tensors in, plain structs out, threads from torch's own pool.
#include <cmath>
#include <limits>

#include "../common/surgery_math.h"
#include "parallel.h"
#include "surgery.h"
#include "surgery_tiles.h"

namespace gradsafe {
namespace {

void compute_sums(const std::vector<SurgeryTask>& tasks, const Tensor& like, Tensor& sums) {
  int64_t tiles = 0;
  for (const SurgeryTask& task : tasks) tiles += surgery_tiles(task.count);
  Tensor workspace = torch::stable::new_empty(like, {tiles * kSurgerySums}, ScalarType::Double);
  double* partials = static_cast<double*>(workspace.mutable_data_ptr());
  for_each_tile(tasks, [&](size_t task, int64_t tile, int64_t place) {
    surgery_cpu_sums(tasks[task], tile, partials + place * kSurgerySums);
  });
  double* out = static_cast<double*>(sums.mutable_data_ptr());
  std::fill_n(out, sums.numel(), 0.0);
  for (const SurgeryTask& task : tasks) {
    double* group = out + task.group * kSurgerySums;
    for (int64_t tile = 0; tile < surgery_tiles(task.count); ++tile, partials += kSurgerySums) {
      for (int q = 0; q < kSurgerySums; ++q) group[q] += partials[q];
    }
  }
}

// [G, 4]: the sums and their coefficients.
Tensor results_of(const Tensor& sums, double rho) {
  const int64_t groups = sums.size(0);
  Tensor results = torch::stable::new_empty(sums, {groups, kSurgeryResults}, ScalarType::Double);
  const double* from = static_cast<const double*>(sums.const_data_ptr());
  double* to = static_cast<double*>(results.mutable_data_ptr());
  for (int64_t g = 0; g < groups; ++g, from += kSurgerySums, to += kSurgeryResults) {
    std::copy_n(from, kSurgerySums, to);
    to[kCoefficient] = surgery_coefficient(from, rho);
  }
  return results;
}

double coefficient_of(const double* results, const SurgeryTask& task) {
  return results[task.group * kSurgeryResults + kCoefficient];
}

Tensor merge(const std::vector<SurgeryTask>& tasks, const Tensor& sums, double rho) {
  Tensor out = results_of(sums, rho);
  const double* results = static_cast<const double*>(out.const_data_ptr());
  for_each_tile(tasks, [&](size_t task, int64_t tile, int64_t) {
    const float coefficient = static_cast<float>(coefficient_of(results, tasks[task]));
    if (coefficient == 0 || std::isnan(coefficient)) return;
    surgery_cpu_merge(tasks[task], tile, coefficient);
  });
  return out;
}

Tensor surgery_sums(std::vector<Tensor> user, std::vector<Tensor> align, IntList groups,
                    int64_t num_groups) {
  Extents extents;
  const std::vector<SurgeryTask> tasks =
      parse_surgery("surgery_sums", user, align, groups, num_groups, false, extents);
  GRADSAFE_CHECK(!user.empty(), "surgery_sums: expected at least one tensor");
  Tensor sums =
      torch::stable::new_empty(user[0], {num_groups, kSurgerySums}, ScalarType::Double);
  compute_sums(tasks, user[0], sums);
  return sums;
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
  return merge(tasks, sums, rho);
}

Tensor surgery(std::vector<Tensor> user, std::vector<Tensor> align, double rho, IntList groups,
               int64_t num_groups) {
  constexpr const char* op = "surgery_";
  Extents extents;
  const std::vector<SurgeryTask> tasks =
      parse_surgery(op, user, align, groups, num_groups, true, extents);
  GRADSAFE_CHECK(!user.empty(), op, ": expected at least one tensor");
  extents.check(op);
  Tensor sums =
      torch::stable::new_empty(user[0], {num_groups, kSurgerySums}, ScalarType::Double);
  compute_sums(tasks, user[0], sums);
  return merge(tasks, sums, rho);
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
  Tensor sums = given_sums ? *given_sums
                           : torch::stable::new_empty(params[0], {num_groups, kSurgerySums},
                                                      ScalarType::Double);
  GRADSAFE_CHECK(parse_sums(op, sums) == num_groups, op, ": expected sums of ", num_groups,
                 " groups, got ", sums.size(0));
  check_same_device(sums, params[0], op, "sums");
  if (!given_sums) compute_sums(call.pairs, params[0], sums);
  Tensor out = results_of(sums, rho);
  double* results = static_cast<double*>(out.mutable_data_ptr());
  bool valid = true;
  for (int64_t g = 0; g < num_groups; ++g) {
    valid = valid && !std::isnan(results[g * kSurgeryResults + kCoefficient]);
  }
  if (!valid) {
    for (int64_t g = 0; g < num_groups; ++g) {
      results[g * kSurgeryResults + kCoefficient] = std::numeric_limits<double>::quiet_NaN();
    }
    return out;
  }
  for (float* step : call.steps) *step += 1;
  const AdamwOptions options{lr, beta1, beta2, eps, weight_decay};
  std::vector<AdamwScalars> scalars;
  for (const SurgeryAdamwTask& task : call.tasks) {
    scalars.push_back(adamw_scalars(options, *task.step));
  }
  for_each_tile(call.tasks, [&](size_t task, int64_t tile, int64_t) {
    const double coefficient = coefficient_of(results, call.pairs[task]);
    surgery_adamw_cpu_update(call.tasks[task], tile, static_cast<float>(coefficient),
                             scalars[task]);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gradsafe, CPU, m) {
  m.impl("surgery_sums", TORCH_BOX(&surgery_sums));
  m.impl("surgery_merge_", TORCH_BOX(&surgery_merge));
  m.impl("surgery_", TORCH_BOX(&surgery));
  m.impl("surgery_adamw_", TORCH_BOX(&surgery_adamw));
}

}  // namespace gradsafe

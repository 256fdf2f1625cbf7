// Entries "surgery_sums", "surgery_merge" and "surgery". Integers: tasks, groups, and for merges
// the bits of rho; then for each task count, dtype and group. Buffers: sums for "surgery_merge";
// then for each task user (in and out unless only sums are wanted) and align. Outputs: users, and
// behind them float64 sums [groups, 3] or results [groups, 4].
#include "gradsafe/surgery.h"

#include <cstring>

#include "cases.h"

namespace emulated {
namespace {

double as_double(int64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

std::vector<gradsafe::SurgeryTask> read_tasks(Case& c, int64_t count, bool writes_user) {
  std::vector<gradsafe::SurgeryTask> tasks(static_cast<std::size_t>(count));
  for (gradsafe::SurgeryTask& task : tasks) {
    task.count = c.integer();
    task.dtype = static_cast<gradsafe::DType>(c.integer());
    task.group = static_cast<int32_t>(c.integer());
    task.user = writes_user ? c.inout() : const_cast<void*>(c.input());
    task.align = c.input();
  }
  return tasks;
}

gradsafe::Status sums_to(Case& c, const gradsafe::SurgeryCudaCall& call, double* sums) {
  void* workspace = c.workspace(gradsafe::surgery_cuda_workspace(call.tasks, call.num_tasks));
  return gradsafe::surgery_cuda_sums(call, workspace, sums);
}

gradsafe::Status run_sums(Case& c) {
  const int64_t count = c.integer(), groups = c.integer();
  const std::vector<gradsafe::SurgeryTask> tasks = read_tasks(c, count, false);
  double* sums = static_cast<double*>(c.output(groups * gradsafe::kSurgerySums * 8));
  return sums_to(c, {tasks.data(), count, groups, nullptr}, sums);
}

gradsafe::Status run_merge(Case& c) {
  const int64_t count = c.integer(), groups = c.integer();
  const double rho = as_double(c.integer());
  const double* sums = static_cast<const double*>(c.input());
  const std::vector<gradsafe::SurgeryTask> tasks = read_tasks(c, count, true);
  double* out = static_cast<double*>(c.output(groups * gradsafe::kSurgeryResults * 8));
  return gradsafe::surgery_cuda_merge({tasks.data(), count, groups, nullptr}, sums, rho, out);
}

gradsafe::Status run_surgery(Case& c) {
  const int64_t count = c.integer(), groups = c.integer();
  const double rho = as_double(c.integer());
  const std::vector<gradsafe::SurgeryTask> tasks = read_tasks(c, count, true);
  const gradsafe::SurgeryCudaCall call{tasks.data(), count, groups, nullptr};
  double* sums = static_cast<double*>(c.workspace(groups * gradsafe::kSurgerySums * 8));
  const gradsafe::Status status = sums_to(c, call, sums);
  if (!status.ok()) return status;
  double* out = static_cast<double*>(c.output(groups * gradsafe::kSurgeryResults * 8));
  return gradsafe::surgery_cuda_merge(call, sums, rho, out);
}

const Entry sums_entry("surgery_sums", &run_sums);
const Entry merge_entry("surgery_merge", &run_merge);
const Entry entry("surgery", &run_surgery);

}  // namespace
}  // namespace emulated

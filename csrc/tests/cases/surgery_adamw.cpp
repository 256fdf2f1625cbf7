// Entry "surgery_adamw". Integers: tasks, counters, groups; the bits of rho, lr, beta1, beta2, eps
// and weight decay; then for each task count, dtype, group and which counter it has. Buffers: sums,
// the counters, then for each task user, align, param, exp_avg and exp_avg_sq. Outputs: counters,
// the last three of each task, float64 results [groups, 4].
#include "gradsafe/surgery_adamw.h"

#include <cstring>

#include "cases.h"

namespace emulated {
namespace {

double as_double(int64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

gradsafe::Status run_surgery_adamw(Case& c) {
  gradsafe::SurgeryAdamwCudaCall call{};
  std::vector<gradsafe::SurgeryAdamwTask> tasks(static_cast<std::size_t>(c.integer()));
  std::vector<float*> steps(static_cast<std::size_t>(c.integer()));
  call.num_groups = c.integer();
  call.rho = as_double(c.integer());
  for (double* option : {&call.options.lr, &call.options.beta1, &call.options.beta2,
                         &call.options.eps, &call.options.weight_decay}) {
    *option = as_double(c.integer());
  }
  call.sums = static_cast<const double*>(c.input());
  for (float*& step : steps) step = static_cast<float*>(c.inout());
  for (gradsafe::SurgeryAdamwTask& task : tasks) {
    task.pair.count = c.integer();
    task.pair.dtype = static_cast<gradsafe::DType>(c.integer());
    task.pair.group = static_cast<int32_t>(c.integer());
    task.step = steps[static_cast<std::size_t>(c.integer())];
    task.pair.user = const_cast<void*>(c.input());
    task.pair.align = c.input();
    task.param = c.inout();
    task.exp_avg = c.inout();
    task.exp_avg_sq = c.inout();
  }
  call.tasks = tasks.data();
  call.num_tasks = static_cast<int64_t>(tasks.size());
  call.steps = steps.data();
  call.num_steps = static_cast<int64_t>(steps.size());
  call.out = static_cast<double*>(c.output(call.num_groups * gradsafe::kSurgeryResults * 8));
  return gradsafe::surgery_adamw_cuda(call);
}

const Entry entry("surgery_adamw", &run_surgery_adamw);

}  // namespace
}  // namespace emulated

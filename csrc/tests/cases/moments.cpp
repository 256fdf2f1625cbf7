// Entry "moments". Integers: dtype of the gradients, dtype of the references, axis, K, unsigned,
// number of tasks; then for each task rows, cols and the row strides of the gradient and of each
// reference. Buffers: for each task its gradient and its references. Output: float64 results.
#include "gradsafe/moments.h"

#include "cases.h"

namespace emulated {
namespace {

gradsafe::Status run_moments(Case& c) {
  gradsafe::MomentsCudaCall call{};
  call.problem.grad_dtype = static_cast<gradsafe::DType>(c.integer());
  call.problem.ref_dtype = static_cast<gradsafe::DType>(c.integer());
  call.problem.axis = static_cast<gradsafe::Axis>(c.integer());
  call.problem.num_refs = static_cast<int32_t>(c.integer());
  call.problem.unsigned_dots = c.integer() != 0;
  std::vector<gradsafe::MomentsTask> tasks(static_cast<std::size_t>(c.integer()));
  std::vector<int64_t> out_offsets{0};
  for (gradsafe::MomentsTask& task : tasks) {
    task = {};
    task.rows = c.integer();
    task.cols = c.integer();
    task.grad_stride = c.integer();
    task.grad = c.input();
    for (int k = 0; k < call.problem.num_refs; ++k) {
      task.ref_strides[k] = c.integer();
      task.refs[k] = c.input();
    }
    out_offsets.push_back(out_offsets.back() +
                          gradsafe::moments_out_size(call.problem.axis, call.problem.num_refs,
                                                     task.rows, task.cols));
  }
  call.tasks = tasks.data();
  call.num_tasks = static_cast<int64_t>(tasks.size());
  call.out = static_cast<double*>(c.output(out_offsets.back() * 8));
  call.out_offsets = out_offsets.data();
  call.workspace =
      c.workspace(gradsafe::moments_cuda_workspace(call.problem, call.tasks, call.num_tasks));
  return gradsafe::moments_cuda(call);
}

const Entry entry("moments", &run_moments);

}  // namespace
}  // namespace emulated

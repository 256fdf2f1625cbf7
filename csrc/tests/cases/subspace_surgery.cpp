// Entry "subspace_surgery". Integers: tasks, rank, the bits of rho; then for each task count and
// dtype. Buffers: the direction, then for each task user (in and out) and basis. Outputs: users, and
// behind them the float64 results [2 + 2 rank].
#include "gradsafe/subspace_surgery.h"

#include <cstring>

#include "cases.h"

namespace emulated {
namespace {

gradsafe::Status run(Case& c) {
  std::vector<gradsafe::SubspaceTask> tasks(static_cast<std::size_t>(c.integer()));
  gradsafe::SubspaceCudaCall call{};
  call.rank = static_cast<int32_t>(c.integer());
  const int64_t bits = c.integer();
  std::memcpy(&call.rho, &bits, sizeof(call.rho));
  call.direction = static_cast<const double*>(c.input());
  for (gradsafe::SubspaceTask& task : tasks) {
    task.count = c.integer();
    task.dtype = static_cast<gradsafe::DType>(c.integer());
    task.user = c.inout();
    task.basis = c.input();
  }
  call.tasks = tasks.data();
  call.num_tasks = static_cast<int64_t>(tasks.size());
  void* workspace = c.workspace(gradsafe::subspace_cuda_workspace(call));
  double* out = static_cast<double*>(c.output(gradsafe::subspace_results(call.rank) * 8));
  return gradsafe::subspace_cuda(call, workspace, out);
}

const Entry entry("subspace_surgery", &run);

}  // namespace
}  // namespace emulated

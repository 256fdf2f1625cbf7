// CUDA operator of surgery with a subspace. Compiled with the host compiler.
#include "cuda_launch.h"
#include "subspace_surgery.h"

namespace gradsafe {
namespace {

Tensor subspace_surgery(std::vector<Tensor> user, std::vector<Tensor> basis, Tensor direction,
                        double rho) {
  const std::vector<SubspaceTask> tasks = parse_subspace(user, basis, direction);
  const torch::stable::accelerator::DeviceGuard guard(user[0].get_device_index());
  const int32_t rank = static_cast<int32_t>(direction.size(0));
  const SubspaceCudaCall call{tasks.data(),
                              static_cast<int64_t>(tasks.size()),
                              rank,
                              static_cast<const double*>(direction.const_data_ptr()),
                              rho,
                              current_stream(user[0].get_device_index())};
  Tensor workspace = torch::stable::new_empty(
      direction, {subspace_cuda_workspace(call) / 8}, ScalarType::Double);
  Tensor out = torch::stable::new_empty(direction, {subspace_results(rank)}, ScalarType::Double);
  check_status(subspace_cuda(call, workspace.mutable_data_ptr(),
                             static_cast<double*>(out.mutable_data_ptr())),
               "subspace_surgery_");
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gradsafe, CUDA, m) {
  m.impl("subspace_surgery_", TORCH_BOX(&subspace_surgery));
}

}  // namespace gradsafe

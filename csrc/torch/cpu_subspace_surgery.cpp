// CPU operator of surgery with a subspace: tensors in, plain structs out.
#include <cmath>

#include "../common/surgery_math.h"
#include "parallel.h"
#include "subspace_surgery.h"
#include "surgery_tiles.h"

namespace gradsafe {
namespace {

Tensor subspace_surgery(std::vector<Tensor> user, std::vector<Tensor> basis, Tensor direction,
                        double rho) {
  const std::vector<SubspaceTask> tasks = parse_subspace(user, basis, direction);
  const int rank = static_cast<int>(direction.size(0)), width = subspace_width(rank);
  const double* along = static_cast<const double*>(direction.const_data_ptr());
  int64_t tiles = 0;
  for (const SubspaceTask& task : tasks) tiles += surgery_tiles(task.count);
  std::vector<double> partials(static_cast<size_t>(tiles * width));
  for_each_tile(tasks, [&](size_t task, int64_t tile, int64_t place) {
    subspace_cpu_sums(tasks[task], rank, tile, partials.data() + place * width);
  });
  std::vector<double> sums(static_cast<size_t>(width), 0.0);
  for (int64_t i = 0; i < tiles * width; ++i) sums[static_cast<size_t>(i % width)] += partials[i];

  Tensor out = torch::stable::new_empty(direction, {subspace_results(rank)}, ScalarType::Double);
  double* results = static_cast<double*>(out.mutable_data_ptr());
  const double conflict = subspace_conflict(sums.data(), along, rank, rho);
  results[0] = conflict;
  results[1] = sums[rank];
  float coefficients[kMaxRank];
  bool idle = true;
  for (int j = 0; j < rank; ++j) {
    const double c = subspace_coefficient(sums.data(), along, j, rho, conflict);
    results[2 + j] = sums[j];
    results[2 + rank + j] = c;
    coefficients[j] = static_cast<float>(c);
    idle = idle && coefficients[j] == 0;
  }
  if (idle || std::isnan(conflict)) return out;
  for_each_tile(tasks, [&](size_t task, int64_t tile, int64_t) {
    subspace_cpu_merge(tasks[task], rank, tile, coefficients);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gradsafe, CPU, m) {
  m.impl("subspace_surgery_", TORCH_BOX(&subspace_surgery));
}

}  // namespace gradsafe

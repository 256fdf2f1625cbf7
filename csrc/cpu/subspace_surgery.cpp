// Hands tiles of surgery with a subspace to the kernels of the instruction set in use.
#include "gradsafe/subspace_surgery.h"

#include <algorithm>

#include "kernels.h"

namespace gradsafe {
namespace {

SubspaceRange range_of(const SubspaceTask& task, int rank, int64_t tile) {
  const int64_t begin = tile * kSurgeryTile, offset = begin * size_of(task.dtype);
  return {static_cast<char*>(task.user) + offset, static_cast<const char*>(task.basis) + offset,
          task.count, std::min(kSurgeryTile, task.count - begin), task.dtype, rank};
}

}  // namespace

void subspace_cpu_sums(const SubspaceTask& task, int rank, int64_t tile, double* partial) {
  kernels().subspace_sums(range_of(task, rank, tile), partial);
}

void subspace_cpu_merge(const SubspaceTask& task, int rank, int64_t tile,
                        const float* coefficients) {
  kernels().subspace_merge(range_of(task, rank, tile), coefficients);
}

}  // namespace gradsafe

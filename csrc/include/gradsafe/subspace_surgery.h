// Gradient surgery with a subspace of alignment directions in place of one (SPF, arXiv 2601.10141).
//
// Over a list of tensors, seen as one long vector u, with k orthonormal vectors U_j of that length
// and the alignment gradient a = sum_j direction_j U_j:
//   dot_j = <u, U_j>
//   conflict = <u, a> = sum_j direction_j dot_j
//   coefficient_j = rho direction_j - (dot_j if conflict < 0, else 0)
//   u <- u + sum_j coefficient_j U_j
#pragma once

#include "gradsafe/surgery.h"
#include "gradsafe/types.h"

namespace gradsafe {

constexpr int kMaxRank = 16;

// One tensor and its parts of the vectors: [rank][count], in the order of the tensor's elements.
struct SubspaceTask {
  void* user;
  const void* basis;
  int64_t count;
  DType dtype;  // of both
};

inline int64_t elements_of(const SubspaceTask& task) { return task.count; }

// Sums: the dots, then the sum of squares of u. Results: conflict, sum of squares, the dots, the
// coefficients.
constexpr int subspace_width(int rank) { return rank + 1; }
constexpr int subspace_results(int rank) { return 2 + 2 * rank; }

// ---- CPU -------------------------------------------------------------------------------------
// Tile `tile` (of kSurgeryTile elements) of one task, on the calling thread.
void subspace_cpu_sums(const SubspaceTask& task, int rank, int64_t tile, double* partial);
void subspace_cpu_merge(const SubspaceTask& task, int rank, int64_t tile,
                        const float* coefficients);

// ---- CUDA ------------------------------------------------------------------------------------
struct SubspaceCudaCall {
  const SubspaceTask* tasks;  // host array
  int64_t num_tasks;
  int32_t rank;
  const double* direction;  // [rank], on the device
  double rho;
  void* stream;  // cudaStream_t
};
int64_t subspace_cuda_workspace(const SubspaceCudaCall& call);  // bytes
// out [subspace_results(rank)], on the device
Status subspace_cuda(const SubspaceCudaCall& call, void* workspace, double* out);

}  // namespace gradsafe

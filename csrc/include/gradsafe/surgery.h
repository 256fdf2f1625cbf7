// SafeGrad's gradient surgery (arXiv 2508.07172, Eq. 3 to 5) over a list of pairs of gradients.
//
// Every group of tensors has one conflict test. With u the user gradient and a the alignment
// gradient, each seen as one long vector over the tensors of the group:
//   dot = <u, a>, sq_user = <u, u>, sq_align = <a, a>
//   coefficient = rho - min(dot, 0) / sq_align
//   u <- u + coefficient a
#pragma once

#include "gradsafe/types.h"

namespace gradsafe {

// Places in a row of sums, and of results, which are the sums and the coefficient.
constexpr int kDot = 0, kSqUser = 1, kSqAlign = 2, kCoefficient = 3;
constexpr int kSurgerySums = 3, kSurgeryResults = 4;

// One pair: `count` elements, unbroken and in the same order in both.
struct SurgeryTask {
  void* user;  // written by the merge only
  const void* align;
  int64_t count;
  DType dtype;  // of both
  int32_t group;
};

inline int64_t elements_of(const SurgeryTask& task) { return task.count; }

// Elements per tile. Every tile has its own partial sums, so the cut decides the rounding: it
// depends on the tensor alone.
constexpr int64_t kSurgeryTile = 32768;
constexpr int64_t surgery_tiles(int64_t count) {
  return (count + kSurgeryTile - 1) / kSurgeryTile;
}

// ---- CPU -------------------------------------------------------------------------------------
// Tile `tile` of one task, on the calling thread.
void surgery_cpu_sums(const SurgeryTask& task, int64_t tile, double* partial /* [kSurgerySums] */);
void surgery_cpu_merge(const SurgeryTask& task, int64_t tile, float coefficient);

// ---- CUDA ------------------------------------------------------------------------------------
// One call handles the whole list; `workspace`, `sums` and `out` live on the device of `stream`.
struct SurgeryCudaCall {
  const SurgeryTask* tasks;  // host array
  int64_t num_tasks;
  int64_t num_groups;
  void* stream;  // cudaStream_t
};
int64_t surgery_cuda_workspace(const SurgeryTask* tasks, int64_t num_tasks);  // bytes
// sums [num_groups][kSurgerySums]
Status surgery_cuda_sums(const SurgeryCudaCall& call, void* workspace, double* sums);
// out [num_groups][kSurgeryResults]
Status surgery_cuda_merge(const SurgeryCudaCall& call, const double* sums, double rho, double* out);

}  // namespace gradsafe

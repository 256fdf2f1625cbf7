// Moments of a gradient, and its dot products with references, in one read.
//
// For a gradient g [rows, cols] and references r_0 .. r_{K-1} of the same shape, every slice
// (tensor, row or column) gets the quantities, in this order:
//   count, sum g, sum g^2, sum |g| r_0, ..., sum |g| r_{K-1}      (g r_k in place of |g| r_k if signed)
#pragma once

#include "gradsafe/types.h"

namespace gradsafe {

// Quantities a kernel accumulates for K references; `count` is known and is not one of them.
constexpr int accumulated(int num_refs) { return 2 + num_refs; }
// Quantities a result holds.
constexpr int reported(int num_refs) { return 3 + num_refs; }

// One gradient with its references. Element (i, j) of a matrix lies at data[i * stride + j].
struct MomentsTask {
  const void* grad;
  const void* refs[kMaxRefs];
  int64_t rows;
  int64_t cols;
  int64_t grad_stride;
  int64_t ref_strides[kMaxRefs];
};

// What a whole call has in common.
struct MomentsProblem {
  DType grad_dtype;
  DType ref_dtype;
  Axis axis;
  int32_t num_refs;
  bool unsigned_dots;
};

// How one task is cut. Results depend on these numbers only, never on threads, SMs or neighbours in
// the list, which is what makes them reproducible.
struct MomentsTiling {
  int64_t rows, cols;  // of the task, after `collapse`
  int64_t tile_rows, tile_cols;
  int64_t row_blocks, col_strips;
  constexpr int64_t tiles() const { return row_blocks * col_strips; }
};

// ---- CPU -------------------------------------------------------------------------------------
// Stage 1 handles tile `tile` of one task on the calling thread and writes its partial sums
// (float64) into `workspace`; stage 2 adds partials in a fixed order.
MomentsTiling tile_moments_cpu(const MomentsProblem& problem, const MomentsTask& task);
int64_t moments_cpu_workspace(const MomentsProblem& problem, const MomentsTiling& tiling);
void moments_cpu_tile(const MomentsProblem& problem, const MomentsTask& task,
                      const MomentsTiling& tiling, int64_t tile, double* workspace);
// `out` holds [reported][slices] for rows, then the same for columns (Axis::both), or one of them.
void moments_cpu_finish(const MomentsProblem& problem, const MomentsTask& task,
                        const MomentsTiling& tiling, const double* workspace, double* out);

// ---- CUDA ------------------------------------------------------------------------------------
// One call handles the whole list; `workspace` and every `out` live on the device of `stream`.
struct MomentsCudaCall {
  MomentsProblem problem;
  const MomentsTask* tasks;  // host array
  int64_t num_tasks;
  double* out;                // results of all tasks, one after the other
  const int64_t* out_offsets;  // host array: where each task's results start, in doubles
  void* workspace;            // moments_cuda_workspace() bytes, 16-byte aligned
  void* stream;               // cudaStream_t
};
int64_t moments_cuda_workspace(const MomentsProblem& problem, const MomentsTask* tasks,
                               int64_t num_tasks);
Status moments_cuda(const MomentsCudaCall& call);

// Entries of `out` that one task fills.
constexpr int64_t moments_out_size(Axis axis, int num_refs, int64_t rows, int64_t cols) {
  int64_t slices = 0;
  if (axis == Axis::tensor) slices = 1;
  if (has_rows(axis)) slices += rows;
  if (has_columns(axis)) slices += cols;
  return slices * reported(num_refs);
}

}  // namespace gradsafe

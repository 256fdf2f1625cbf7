// The chunk planner: how a matrix is cut into tiles. Host code, shared by the CPU and CUDA paths.
#pragma once

#include "gradsafe/moments.h"

namespace gradsafe {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// True if every matrix of the task is one unbroken run of rows * cols elements.
inline bool is_unbroken(const MomentsTask& task, int num_refs) {
  bool unbroken = task.rows <= 1 || task.grad_stride == task.cols;
  for (int k = 0; k < num_refs; ++k) {
    unbroken = unbroken && (task.rows <= 1 || task.ref_strides[k] == task.cols);
  }
  return unbroken;
}

// Cuts [rows, cols] into tiles of at most tile_rows x tile_cols. An empty matrix has no tiles.
inline MomentsTiling make_tiling(int64_t rows, int64_t cols, int64_t tile_rows, int64_t tile_cols) {
  MomentsTiling tiling{};
  tiling.rows = rows;
  tiling.cols = cols;
  tiling.tile_rows = tile_rows;
  tiling.tile_cols = tile_cols;
  const bool empty = rows == 0 || cols == 0;
  tiling.row_blocks = empty ? 0 : ceil_div(rows, tile_rows);
  tiling.col_strips = empty ? 0 : ceil_div(cols, tile_cols);
  return tiling;
}

// For Axis::tensor an unbroken matrix is read as one long row: short rows would waste lanes.
inline MomentsTiling tile_matrix(const MomentsProblem& problem, const MomentsTask& task,
                                 int64_t flat_tile, int64_t tile_rows, int64_t tile_cols) {
  if (problem.axis == Axis::tensor && is_unbroken(task, problem.num_refs)) {
    const int64_t n = task.rows * task.cols;
    return make_tiling(n == 0 ? 0 : 1, n, 1, flat_tile);
  }
  return make_tiling(task.rows, task.cols, tile_rows, tile_cols);
}

}  // namespace gradsafe

// Stage 1 hands tiles to the kernels of the instruction set in use; stage 2 adds their partial sums
// in index order. Partials of one task lie in the workspace as
//   Axis::tensor  [tiles][Q]
//   rows          [col_strips][rows][Q]
//   columns       [row_blocks][Q][cols]   (behind the rows for Axis::both)
#include "gradsafe/moments.h"

#include <algorithm>

#include "../common/tiling.h"
#include "moments_tile.h"

namespace gradsafe {
namespace {

constexpr int64_t kFlatTile = 65536;
constexpr int64_t kTileRows = 256;

int64_t row_partials(const MomentsTiling& t, int q) { return t.col_strips * t.rows * q; }
int64_t col_partials(const MomentsTiling& t, int q) { return t.row_blocks * t.cols * q; }

// Writes the known count in front of each result block: out [reported][slices].
void fill_count(double* out, int64_t slices, int64_t count) {
  std::fill_n(out, slices, static_cast<double>(count));
}

}  // namespace

MomentsTiling tile_moments_cpu(const MomentsProblem& problem, const MomentsTask& task) {
  return tile_matrix(problem, task, kFlatTile, kTileRows, kCpuTileCols);
}

int64_t moments_cpu_workspace(const MomentsProblem& problem, const MomentsTiling& tiling) {
  const int q = accumulated(problem.num_refs);
  if (problem.axis == Axis::tensor) return tiling.tiles() * q;
  int64_t size = 0;
  if (has_rows(problem.axis)) size += row_partials(tiling, q);
  if (has_columns(problem.axis)) size += col_partials(tiling, q);
  return size;
}

TileRange locate_tile(const MomentsTiling& tiling, int64_t tile) {
  TileRange r{};
  r.tile = tile;
  r.row_block = tile / tiling.col_strips;
  r.col_strip = tile % tiling.col_strips;
  r.row_begin = r.row_block * tiling.tile_rows;
  r.row_end = std::min(r.row_begin + tiling.tile_rows, tiling.rows);
  r.col_begin = r.col_strip * tiling.tile_cols;
  r.col_end = std::min(r.col_begin + tiling.tile_cols, tiling.cols);
  return r;
}

MomentsTileArgs tile_outputs(const MomentsProblem& problem, const MomentsTiling& tiling,
                             const TileRange& range, double* workspace) {
  const int q = accumulated(problem.num_refs);
  MomentsTileArgs args{};
  args.row_begin = range.row_begin;
  args.row_end = range.row_end;
  args.col_begin = range.col_begin;
  args.col_end = range.col_end;
  if (problem.axis == Axis::tensor) args.tensor_out = workspace + range.tile * q;
  if (has_rows(problem.axis)) {
    args.row_out = workspace + (range.col_strip * tiling.rows + range.row_begin) * q;
    workspace += row_partials(tiling, q);
  }
  if (has_columns(problem.axis)) {
    args.col_out = workspace + range.row_block * tiling.cols * q + range.col_begin;
    args.col_stride = tiling.cols;
  }
  return args;
}

void clear_outputs(const MomentsTileArgs& args, int q) {
  if (args.tensor_out) std::fill_n(args.tensor_out, q, 0.0);
  if (args.row_out) std::fill_n(args.row_out, (args.row_end - args.row_begin) * q, 0.0);
  for (int i = 0; args.col_out && i < q; ++i) {
    std::fill_n(args.col_out + i * args.col_stride, args.col_end - args.col_begin, 0.0);
  }
}

void moments_cpu_tile(const MomentsProblem& problem, const MomentsTask& task,
                      const MomentsTiling& tiling, int64_t tile, double* workspace) {
  MomentsTileArgs args = tile_outputs(problem, tiling, locate_tile(tiling, tile), workspace);
  args.problem = &problem;
  args.task = &task;
  clear_outputs(args, accumulated(problem.num_refs));
  kernels().moments_tile(args);
}

void moments_cpu_finish(const MomentsProblem& problem, const MomentsTask& task,
                        const MomentsTiling& tiling, const double* workspace, double* out) {
  const int q = accumulated(problem.num_refs);
  if (problem.axis == Axis::tensor) {
    out[0] = static_cast<double>(task.rows * task.cols);
    std::fill_n(out + 1, q, 0.0);
    for (int64_t tile = 0; tile < tiling.tiles(); ++tile) {
      for (int i = 0; i < q; ++i) out[1 + i] += workspace[tile * q + i];
    }
    return;
  }
  if (has_rows(problem.axis)) {
    fill_count(out, task.rows, task.cols);
    double* sums = out + task.rows;
    std::fill_n(sums, q * task.rows, 0.0);
    for (int64_t strip = 0; strip < tiling.col_strips; ++strip) {
      const double* partial = workspace + strip * task.rows * q;
      for (int64_t row = 0; row < task.rows; ++row) {
        for (int i = 0; i < q; ++i) sums[i * task.rows + row] += partial[row * q + i];
      }
    }
    out += reported(problem.num_refs) * task.rows;
    workspace += row_partials(tiling, q);
  }
  if (has_columns(problem.axis)) {
    fill_count(out, task.cols, task.rows);
    double* sums = out + task.cols;
    std::fill_n(sums, q * task.cols, 0.0);
    for (int64_t block = 0; block < tiling.row_blocks; ++block) {
      const double* partial = workspace + block * q * task.cols;
      for (int64_t i = 0; i < q * task.cols; ++i) sums[i] += partial[i];
    }
  }
}

}  // namespace gradsafe

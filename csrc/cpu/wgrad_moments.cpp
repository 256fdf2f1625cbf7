// Weight gradients in panels: each panel is computed, scored and forgotten.
//
// A tile is kTileRows x kTileCols of the gradient, for all samples of a group. Within it, blocks of
// kBlockRows rows are taken one after the other; the references of a block stay in L2 while every
// sample's block of G is computed into one panel there and read by the kernel of `moments`. Partial
// sums have the layout of `moments`, per sample, and so its second stage finishes them.
//
// A sample of few tokens needs no panel: its entries are formed in the registers of the scoring
// kernel, with the same bits.
#include "gradsafe/wgrad_moments.h"

#include <algorithm>

#include "../common/tiling.h"
#include "isa.h"
#include "moments_tile.h"

namespace gradsafe {
namespace {

// Upper bounds; the actual sizes split a matrix evenly, so that threads get equal shares.
constexpr int64_t kTileRows = 384;
constexpr int64_t kTileCols = 512;
constexpr int64_t kBlockRows = 96;
// Up to here the loads of factors cost less than a panel's way through L2.
constexpr int64_t kFewTokens = 12;
static_assert(kTileRows % kPanelRows == 0 && kBlockRows % kPanelRows == 0, "whole row tiles");
static_assert(kTileCols % kChunkCols == 0 && kTileCols <= kCpuTileCols, "whole chunks");

// The smallest multiple of `unit` that cuts `size` into as few parts as `limit` does.
int64_t even_part(int64_t size, int64_t limit, int64_t unit) {
  if (size == 0) return limit;
  const int64_t parts = ceil_div(size, limit);
  return ceil_div(ceil_div(size, parts), unit) * unit;
}

MomentsProblem scoring_problem(const WgradProblem& p) {
  MomentsProblem scoring{};
  scoring.grad_dtype = DType::f32;  // of the panel
  scoring.ref_dtype = p.num_refs ? p.ref_dtype : DType::f32;
  scoring.axis = p.axis;
  scoring.num_refs = p.num_refs;
  scoring.unsigned_dots = p.unsigned_dots;
  return scoring;
}

// Parts of one thread's scratch memory, in floats. Of pairs, a word holds two tokens.
struct Scratch {
  float* panel;  // [kBlockRows][kTileCols]
  float* dy;     // [row tiles][tokens][kPanelRows]
  float* rows;   // [tokens][kBlockRows], before it is cut into row tiles
  float* x;      // [tokens][kChunkCols], of few tokens [tokens][kTileCols]
};

Scratch divide(float* memory, int64_t tokens) {
  Scratch s;
  s.panel = memory;
  s.dy = s.panel + kBlockRows * kTileCols;
  s.rows = s.dy + tokens * kBlockRows;
  s.x = s.rows + tokens * kBlockRows;
  return s;
}

const PanelKernels& panel_kernels(const ActiveTokens& active) {
  return active.pairs ? kernels().pairs : kernels().singles;
}
int64_t packed_tokens(const ActiveTokens& active) {
  return active.pairs ? ceil_div(active.count, 2) : active.count;
}

// dy of one block as [row tile][token][kPanelRows]; rows past the matrix are zero.
void pack_dy(const WgradProblem& p, const ActiveTokens& active, int64_t first_row, int64_t rows,
             const Scratch& s) {
  PackArgs pack{p.dy,      p.dtype, p.dy_stride, active.tokens, active.count,
                first_row, rows,    kBlockRows,  s.rows};
  panel_kernels(active).pack(pack);
  const int64_t tokens = packed_tokens(active);
  for (int64_t tile = 0; tile < ceil_div(rows, kPanelRows); ++tile) {
    float* out = s.dy + tile * tokens * kPanelRows;
    for (int64_t t = 0; t < tokens; ++t) {
      const float* row = s.rows + t * kBlockRows + tile * kPanelRows;
      for (int64_t i = 0; i < kPanelRows; ++i) out[t * kPanelRows + i] = row[i];
    }
  }
}

// G of one sample, `rows` x `cols` from (first_row, first_col), into the panel.
void compute_panel(const WgradProblem& p, const ActiveTokens& active, int64_t first_row,
                   int64_t rows, int64_t first_col, int64_t cols, const Scratch& s) {
  pack_dy(p, active, first_row, rows, s);
  for (int64_t col = 0; col < cols; col += kChunkCols) {
    const int64_t width = std::min(kChunkCols, cols - col);
    PackArgs pack{p.x,     p.dtype,         p.x_stride, active.tokens, active.count,
                  first_col + col, width, kChunkCols, s.x};
    panel_kernels(active).pack(pack);
    WgradPanelArgs panel{};
    panel.dy = s.dy;
    panel.x = s.x;
    panel.tokens = packed_tokens(active);
    panel.row_tiles = ceil_div(rows, kPanelRows);
    panel.vectors = ceil_div(width, 16);
    panel.out = s.panel + col;
    panel.out_stride = kTileCols;
    panel_kernels(active).panel(panel);
  }
}

// The factors of the same block, for a sample of few tokens.
GradFactors pack_factors(const WgradProblem& p, const ActiveTokens& active, int64_t first_row,
                         int64_t rows, int64_t first_col, int64_t cols, const Scratch& s) {
  PackArgs pack{p.dy,      p.dtype, p.dy_stride, active.tokens, active.count,
                first_row, rows,    kBlockRows,  s.rows};
  kernels().singles.pack(pack);
  pack = {p.x, p.dtype, p.x_stride, active.tokens, active.count, first_col, cols, kTileCols, s.x};
  kernels().singles.pack(pack);
  return {s.rows, s.x, active.count, kBlockRows, kTileCols};
}

bool pairs_serve(const WgradProblem& p, const int32_t* tokens, int64_t count) {
  if (p.dtype != DType::bf16 || !has_bf16_pairs()) return false;
  const auto least = [&](const void* matrix, int64_t stride, int64_t width) {
    int exponent = 255;
    for (int64_t t = 0; t < count; ++t) {
      const uint16_t* row = static_cast<const uint16_t*>(matrix) + tokens[t] * stride;
      exponent = std::min(exponent, kernels().smallest_exponent(row, width));
    }
    return exponent;
  };
  return pairs_are_exact(least(p.x, p.x_stride, p.in_features),
                         least(p.dy, p.dy_stride, p.out_features));
}

}  // namespace

MomentsTiling tile_wgrad_moments_cpu(const WgradProblem& p) {
  return make_tiling(p.out_features, p.in_features,
                     even_part(p.out_features, kTileRows, kPanelRows),
                     even_part(p.in_features, kTileCols, kChunkCols));
}

int64_t wgrad_moments_cpu_workspace(const WgradProblem& p) {
  return moments_cpu_workspace(scoring_problem(p), tile_wgrad_moments_cpu(p));
}

int64_t wgrad_moments_cpu_scratch(int64_t tokens) {
  return kBlockRows * kTileCols + tokens * (2 * kBlockRows + kChunkCols) + kFewTokens * kTileCols;
}

ActiveTokens find_active_tokens(const WgradProblem& p, int64_t sample, int32_t* tokens) {
  int64_t count = 0;
  for (int64_t t = p.starts[sample]; t < p.starts[sample] + p.lengths[sample]; ++t) {
    if (!kernels().is_idle_token(p, t)) tokens[count++] = static_cast<int32_t>(t);
  }
  return {tokens, count, pairs_serve(p, tokens, count)};
}

void wgrad_moments_cpu_tile(const WgradProblem& p, const SampleGroup& group,
                            const ActiveTokens* active, int64_t tile, double* workspace,
                            float* scratch, int64_t scratch_tokens) {
  const MomentsProblem scoring = scoring_problem(p);
  const MomentsTiling tiling = tile_wgrad_moments_cpu(p);
  const int64_t per_sample = moments_cpu_workspace(scoring, tiling);
  const Scratch s = divide(scratch, scratch_tokens);
  const TileRange range = locate_tile(tiling, tile);
  for (int64_t i = 0; i < group.count; ++i) {
    clear_outputs(tile_outputs(scoring, tiling, range, workspace + i * per_sample),
                  accumulated(p.num_refs));
  }
  const int64_t cols = range.col_end - range.col_begin;
  const int64_t block_rows = even_part(range.row_end - range.row_begin, kBlockRows, kPanelRows);
  for (int64_t row = range.row_begin; row < range.row_end; row += block_rows) {
    const int64_t rows = std::min(block_rows, range.row_end - row);
    MomentsTask task{};
    task.grad = s.panel;
    task.rows = rows;
    task.cols = cols;
    task.grad_stride = kTileCols;
    for (int k = 0; k < p.num_refs; ++k) {
      const int64_t first =
          group.expert * p.expert_strides[k] + row * p.ref_strides[k] + range.col_begin;
      task.refs[k] = static_cast<const char*>(p.refs[k]) + first * size_of(p.ref_dtype);
      task.ref_strides[k] = p.ref_strides[k];
    }
    for (int64_t i = 0; i < group.count; ++i) {
      const ActiveTokens& tokens = active[group.samples[i]];
      if (tokens.count == 0) continue;  // G is zero, and so are its sums
      MomentsTileArgs args = tile_outputs(scoring, tiling, range, workspace + i * per_sample);
      args.problem = &scoring;
      args.task = &task;
      if (args.row_out) args.row_out += (row - range.row_begin) * accumulated(p.num_refs);
      args.row_begin = args.col_begin = 0;
      args.row_end = rows;
      args.col_end = cols;
      if (tokens.count <= kFewTokens) {
        const GradFactors factors =
            pack_factors(p, tokens, row, rows, range.col_begin, cols, s);
        args.factors = &factors;
        kernels().factors_tile(args);
      } else {
        compute_panel(p, tokens, row, rows, range.col_begin, cols, s);
        kernels().moments_tile(args);
      }
    }
  }
}

void wgrad_moments_cpu_finish(const WgradProblem& p, const double* workspace, double* out) {
  MomentsTask task{};
  task.rows = p.out_features;
  task.cols = p.in_features;
  moments_cpu_finish(scoring_problem(p), task, tile_wgrad_moments_cpu(p), workspace, out);
}

}  // namespace gradsafe

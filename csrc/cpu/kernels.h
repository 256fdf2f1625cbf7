// The table of kernels that each instruction-set object exports, and nothing else.
#pragma once

#include "../common/kl_value.h"
#include "gradsafe/cosine_topk.h"
#include "gradsafe/kl_divergence.h"
#include "gradsafe/surgery_adamw.h"
#include "gradsafe/wgrad_moments.h"

namespace gradsafe {

// A gradient as the product of its factors, packed float32: entry (i, j) is the sum over tokens t
// of dy[t * dy_stride + i] * x[t * x_stride + j]. x has whole vectors of 16 columns, the last one
// filled up with zeros.
struct GradFactors {
  const float *dy, *x;
  int64_t tokens, dy_stride, x_stride;
};

// What a tile of `moments` reads and where its partial sums go. Unused outputs are null.
struct MomentsTileArgs {
  const MomentsProblem* problem;
  const MomentsTask* task;
  const GradFactors* factors;  // in place of task->grad, for factors_tile
  int64_t row_begin, row_end, col_begin, col_end;
  double* tensor_out;  // [accumulated]
  double* row_out;     // [row_end - row_begin][accumulated]
  double* col_out;     // [accumulated] blocks of col_stride doubles
  int64_t col_stride;
};

// A panel of a weight gradient: out[i][c] = sum over tokens of dy[t][i] * x[t][c], for a chunk of
// kChunkCols columns. Both operands are packed float32.
struct WgradPanelArgs {
  const float* dy;    // [row_tiles][tokens][kPanelRows]
  const float* x;     // [tokens][kChunkCols]
  int64_t tokens;     // words of two bfloat16 tokens for the kernels of pairs
  int64_t row_tiles;
  int64_t vectors;    // of 16 columns, 1 to kChunkCols / 16
  float* out;
  int64_t out_stride;
};

// Gathers rows `tokens[0 .. count)` of a matrix as float32: width columns, zeros up to `padded`.
struct PackArgs {
  const void* matrix;
  DType dtype;
  int64_t stride;
  const int32_t* tokens;
  int64_t count;
  int64_t first_col, width, padded;
  float* out;  // [count][padded]
};

// Kernels of pairs flush subnormal numbers, which is exact where none can occur. Elements whose
// exponent fields are at least a and b are multiples of 2^(a - 134) and 2^(b - 134), so that
// products and all their sums, rounded or not, are multiples of 2^(a + b - 268): zero, or at least
// the smallest normal number 2^-126 if that is one.
constexpr bool pairs_are_exact(int a, int b) { return a > 0 && b > 0 && a + b - 268 >= -126; }

// Two ways to a panel: float32 operands, or words of two bfloat16 tokens.
struct PanelKernels {
  void (*pack)(const PackArgs& args);
  void (*panel)(const WgradPanelArgs& args);
};

// One vector as float32 times a power of two; `out` has room for whole vectors of 16.
struct PackScaledArgs {
  const void* row;
  DType dtype;
  int64_t count;
  float scale;
  float* out;
};

// Cosines of row_tiles * kPanelRows packed rows with up to kCosinePanel packed queries.
struct CosinePanelArgs {
  const float* rows;
  int64_t row_stride;
  int64_t row_tiles;
  const float* queries;  // [features][kCosinePanel]
  int64_t vectors;       // of 16 queries
  int64_t features;
  const double* row_inverses;    // 1 / norm, 0 of a zero vector, NaN of one that is not finite
  const double* query_inverses;
  double* sums;   // [rows][kCosinePanel]
  float* scores;  // [rows][kCosinePanel]
};

// Two ways to a panel of cosines as well: with pairs, a word holds two features, the earlier one in
// the high half, and `features`, `rows` and `queries` of the panel count and hold words.
struct PackedPairs {
  double squares;    // as pack_scaled
  uint32_t largest;  // as largest_magnitude
  int smallest;      // as smallest_exponent
};
struct CosinePairKernels {
  PackedPairs (*pack)(const uint16_t* row, int64_t features, float* out);
  void (*panel)(const CosinePanelArgs& args);
};

// Products of up to 16 rows, read where they lie, with 1 to kCosineInPlace packed queries.
constexpr int64_t kCosineInPlace = 4;
struct CosineRowsArgs {
  const void* rows;
  DType dtype;
  int64_t row_stride;
  int64_t count;          // rows
  const float* queries;   // [num_queries][query_stride], zeros behind the features up to 16
  int64_t query_stride;
  int64_t num_queries;
  int64_t features;
  double* dots;       // [num_queries][16]
  double* squares;    // [16]: sums of squares
  uint32_t* largest;  // [16]: bits of the largest magnitudes, as largest_magnitude
};

// A tile of gradient surgery: `count` neighbouring elements.
struct SurgeryRange {
  void* user;
  const void* align;
  int64_t count;
  DType dtype;
};

// The same of the fused step; `pair.user` is only read.
struct SurgeryAdamwRange {
  SurgeryRange pair;
  void* param;
  void* exp_avg;
  void* exp_avg_sq;
};

// A tile of surgery with a subspace: `count` neighbouring elements of a tensor and of each of `rank`
// vectors, which lie `stride` elements apart.
struct SubspaceRange {
  void* user;
  const void* basis;
  int64_t stride, count;
  DType dtype;
  int rank;
};

// Neighbouring logits of one row of the student and the teacher.
struct KlSegment {
  const void* student;
  const void* teacher;
  DType student_dtype, teacher_dtype;
  int64_t count;
};

// What turns exponentials into the gradient: 1 / sum of each side, and the row's weight.
struct KlScales {
  KlMaxima maxima;
  float student, teacher, weight;
};

struct CpuKernels {
  void (*moments_tile)(const MomentsTileArgs& args);
  void (*factors_tile)(const MomentsTileArgs& args);
  PanelKernels singles;
  PanelKernels pairs;  // null at levels without them; see has_bf16_pairs (isa.h)
  // True if row `row` takes no part in a weight gradient: dy is all zero there and x is finite (a
  // zero times NaN or infinity is NaN, which must be seen).
  bool (*is_idle_token)(const WgradProblem& problem, int64_t row);
  // Smallest exponent field among the nonzero elements of n bfloat16 numbers; 255 if there are none.
  int (*smallest_exponent)(const uint16_t* numbers, int64_t n);
  // Bits of the largest magnitude of a vector, as a float32; those of infinity or NaN if it is not
  // finite.
  uint32_t (*largest_magnitude)(const void* row, DType dtype, int64_t count);
  double (*pack_scaled)(const PackScaledArgs& args);  // returns the sum of squares
  void (*cosine_panel)(const CosinePanelArgs& args);
  CosinePairKernels cosine_pairs;  // null at levels without them, like `pairs`
  void (*cosine_rows)(const CosineRowsArgs& args);  // null at levels without it
  void (*surgery_sums)(const SurgeryRange& range, double* partial);
  void (*surgery_merge)(const SurgeryRange& range, float coefficient);
  void (*surgery_adamw)(const SurgeryAdamwRange& range, float coefficient,
                        const AdamwScalars& scalars);
  void (*subspace_sums)(const SubspaceRange& range, double* partial);
  void (*subspace_merge)(const SubspaceRange& range, const float* coefficients);
  // Raises the maxima to the segment's, then sums it relative to them.
  void (*kl_sums)(const KlSegment& segment, KlMaxima* maxima, KlSums* sums);
  // `out` has the student's dtype and may be the student's own buffer.
  void (*kl_gradient)(const KlSegment& segment, const KlScales& scales, void* out);
};

// Widest tile the kernels keep column accumulators for.
constexpr int64_t kCpuTileCols = 1024;
// Six rows of accumulators fit the sixteen registers of AVX2 and leave room for operands; all
// levels use the same, so that one packed layout serves them.
constexpr int64_t kPanelRows = 6;
constexpr int64_t kChunkCols = 64;

const CpuKernels& kernels_scalar();
const CpuKernels& kernels_avx2();
const CpuKernels& kernels_avx512();

// The table of the instruction set in use (isa.h).
const CpuKernels& kernels();

}  // namespace gradsafe

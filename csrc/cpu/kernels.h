// The table of kernels that each instruction-set object exports, and nothing else.
#pragma once

#include "gradsafe/moments.h"

namespace gradsafe {

// What a tile of `moments` reads and where its partial sums go. Unused outputs are null.
struct MomentsTileArgs {
  const MomentsProblem* problem;
  const MomentsTask* task;
  int64_t row_begin, row_end, col_begin, col_end;
  double* tensor_out;  // [accumulated]
  double* row_out;     // [row_end - row_begin][accumulated]
  double* col_out;     // [accumulated] blocks of col_stride doubles
  int64_t col_stride;
};

struct CpuKernels {
  void (*moments_tile)(const MomentsTileArgs& args);
};

// Widest tile the kernels keep column accumulators for.
constexpr int64_t kCpuTileCols = 1024;

const CpuKernels& kernels_scalar();
const CpuKernels& kernels_avx2();
const CpuKernels& kernels_avx512();

// The table of the instruction set in use (isa.h).
const CpuKernels& kernels();

}  // namespace gradsafe

// The second stage of wgrad_moments: adds float32 partials in index order, in float64.
#pragma once

#include "reduce.cuh"
#include "sample_parts.cuh"

namespace gradsafe {
namespace {

constexpr int kFinishThreads = 256;

// Partials [sample][quantity][slot], one result per sample and quantity. blockIdx.x is the sample,
// blockIdx.y the quantity. `count` is the number of entries of a gradient.
__global__ void __launch_bounds__(kFinishThreads)
    finish_wgrad_tensor(const float* partials, int64_t slots, double count, double* out,
                        const __grid_constant__ ResultRows rows) {
  __shared__ double shared[kFinishThreads / kWarp];
  const int64_t quantities = gridDim.y;
  partials += (blockIdx.x * quantities + blockIdx.y) * slots;
  out += rows.of[blockIdx.x] * (1 + quantities);
  double sum[1] = {};
  for (int64_t slot = threadIdx.x; slot < slots; slot += kFinishThreads) sum[0] += partials[slot];
  if (threadIdx.x == 0 && blockIdx.y == 0) out[0] = count;
  block_sum_to(sum, shared, out + 1 + blockIdx.y);
}

// Rows or columns: partials [tile][sample][quantity][slice], one thread per result of a sample.
// blockIdx.y is the sample.
struct SliceResults {
  const float* partials;
  double* out;
  int64_t tiles, slices, quantities;
  int64_t out_per_sample;
  double count;  // entries of a slice
  ResultRows rows;
};
__global__ void __launch_bounds__(kFinishThreads)
    finish_wgrad_slices(const __grid_constant__ SliceResults r) {
  const int64_t sample = blockIdx.y, values = r.quantities * r.slices;
  const float* partials = r.partials + sample * values;
  double* out = r.out + r.rows.of[sample] * r.out_per_sample;
  const int64_t step = int64_t{gridDim.x} * kFinishThreads;
  for (int64_t i = int64_t{blockIdx.x} * kFinishThreads + threadIdx.x; i < values; i += step) {
    double sum = 0;
    for (int64_t tile = 0; tile < r.tiles; ++tile) sum += partials[tile * gridDim.y * values + i];
    out[r.slices + i] = sum;
    if (i < r.slices) out[i] = r.count;
  }
}

}  // namespace
}  // namespace gradsafe

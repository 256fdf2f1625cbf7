// The Hopper form of wgrad_moments, as wgrad_moments.cu sees it.
#pragma once

#include "common/device.cuh"
#include "common/sample_parts.cuh"

namespace gradsafe {

struct WgradTiles {
  int64_t rows, cols;
  int64_t parts;  // of a tile, with a partial of their own for Axis::tensor
};

// Whether the problem and the device are ones this form is made for.
bool wgrad_sm90_takes(const WgradProblem& problem, const DeviceLimits& device);
WgradTiles wgrad_sm90_tiles(const WgradProblem& problem);
// Writes the partials of one launch: for Axis::tensor [sample][quantity][tile][part], for Axis::row
// [column tile][sample][quantity][row].
Status wgrad_moments_sm90(const WgradProblem& problem, const SampleParts& parts, float* partials,
                          const DeviceLimits& device, void* stream);

}  // namespace gradsafe

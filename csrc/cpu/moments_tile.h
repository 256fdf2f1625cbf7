// Where a tile's partial sums lie in the workspace of `moments`; `wgrad_moments` shares the layout.
#pragma once

#include "kernels.h"

namespace gradsafe {

struct TileRange {
  int64_t tile, row_block, col_strip, row_begin, row_end, col_begin, col_end;
};

TileRange locate_tile(const MomentsTiling& tiling, int64_t tile);

// Outputs of the tile inside one task's workspace; problem and task are left to the caller.
MomentsTileArgs tile_outputs(const MomentsProblem& problem, const MomentsTiling& tiling,
                             const TileRange& range, double* workspace);

// Sets the tile's partial sums to zero; the kernels add to them.
void clear_outputs(const MomentsTileArgs& args, int quantities);

}  // namespace gradsafe

// Which tensor of a list a block works on.
#pragma once

#include "launch.cuh"

namespace gradsafe {

// The entry that holds tile `tile` of the launch; entries are in the order of their first tiles.
template <class Batch>
__device__ inline const auto& find_entry(const Batch& batch, int64_t tile) {
  int low = 0, high = batch.count - 1;
  while (low < high) {  // last entry whose first tile is not behind `tile`
    const int middle = (low + high + 1) / 2;
    if (batch.entries[middle].first_tile <= tile) low = middle; else high = middle - 1;
  }
  return batch.entries[low];
}

}  // namespace gradsafe

// How a list of tensors becomes the entries of a launch, and which of them a block works on.
#pragma once

#include <iterator>

#include "launch.cuh"

namespace gradsafe {

// Fills a launch with the tasks at(next), at(next + 1) and so on of `count`, until it is full;
// `next` is then the first that is left. Tensors without elements take no entry.
template <class Batch, class At>
void fill_entries(Batch& batch, int64_t count, int64_t& next, const At& at) {
  batch.count = 0;
  batch.tiles = 0;
  for (; next < count && batch.count < static_cast<int64_t>(std::size(batch.entries)); ++next) {
    const auto& task = at(next);
    if (elements_of(task) == 0) continue;
    batch.entries[batch.count++] = {task, batch.tiles};
    batch.tiles += surgery_tiles(elements_of(task));
  }
}

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

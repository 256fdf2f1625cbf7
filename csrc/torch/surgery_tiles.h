// Tiles of lists of tensors, over the threads of torch's pool.
#pragma once

#include <algorithm>
#include <vector>

#include "gradsafe/surgery.h"
#include "parallel.h"

namespace gradsafe {

// Calls body(task index, tile within the task, tile within the call). A thread takes its share from
// the end: what it read last in the first pass is still in its cache for the second.
template <class Task, class Body>
void for_each_tile(const std::vector<Task>& tasks, const Body& body) {
  std::vector<int64_t> first{0};
  int64_t elements = 0;
  for (const Task& task : tasks) {
    first.push_back(first.back() + surgery_tiles(elements_of(task)));
    elements += elements_of(task);
  }
  const int64_t tiles = first.back();
  if (tiles == 0) return;
  parallel_for(0, tiles, grain_for(tiles, elements), [&](int64_t begin, int64_t end) {
    size_t task = std::upper_bound(first.begin(), first.end(), end - 1) - first.begin() - 1;
    for (int64_t tile = end - 1; tile >= begin; --tile) {
      while (tile < first[task]) --task;
      body(task, tile - first[task], tile);
    }
  });
}

}  // namespace gradsafe

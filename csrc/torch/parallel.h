// How work is dealt out to the threads of torch's own pool.
#pragma once

#include <cstdint>

namespace gradsafe {

// Waking a second thread takes microseconds: below this many element operations one is faster.
constexpr int64_t kWorkPerThread = 65536;

// Items per chunk of parallel_for when `items` share `work` element operations.
inline int64_t grain_for(int64_t items, int64_t work) {
  return items == 0 ? 1 : kWorkPerThread / (work / items + 1) + 1;
}

}  // namespace gradsafe

// How work is dealt out to the threads of torch's own pool.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#if defined(__SANITIZE_THREAD__)
extern "C" void __tsan_acquire(void* at);
extern "C" void __tsan_release(void* at);
#endif

namespace gradsafe {

// f(begin, end) on parts of a range, on the threads of torch's pool. Those synchronise inside
// OpenMP, which ThreadSanitizer cannot see; it is told where they start and end.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
#if defined(__SANITIZE_THREAD__)
  static char started, ended;
  const auto told = [&](int64_t first, int64_t last) {
    __tsan_acquire(&started);
    f(first, last);
    __tsan_release(&ended);
  };
  __tsan_release(&started);  // after `told` is written
  torch::stable::parallel_for(begin, end, grain, told);
  __tsan_acquire(&ended);
#else
  torch::stable::parallel_for(begin, end, grain, f);
#endif
}

// Waking a second thread takes microseconds: below this many element operations one is faster.
constexpr int64_t kWorkPerThread = 65536;

// Items per chunk of parallel_for when `items` share `work` element operations.
inline int64_t grain_for(int64_t items, int64_t work) {
  return items == 0 ? 1 : kWorkPerThread / (work / items + 1) + 1;
}

// Deals out items of unequal work: body(next) runs once on each thread, and next(item) hands it one
// item after the other until none is left. For results that do not depend on who computes what.
template <class Body>
void deal_out(int64_t items, int64_t work, const Body& body) {
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t workers = std::min({items, threads, work / kWorkPerThread + 1});
  std::atomic<int64_t> taken{0};
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      body([&](int64_t& item) { return (item = taken.fetch_add(1)) < items; });
    }
  });
}

}  // namespace gradsafe

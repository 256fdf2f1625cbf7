// How far the threads of a block have seen each other, other than by barriers of the whole block.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace emulated {

constexpr unsigned kLanes = 32;
constexpr unsigned kWarpgroup = 128;
constexpr unsigned kMaxMbarriers = 64;  // of a block

// A point in the order of a block.
struct Moment {
  uint32_t epoch, clock;
};

// Row t, column s: up to which clock t has seen s. A thread's own clock counts what it has released.
//
// In the beginning, only the lanes of a warp see each other (__syncwarp), and a row has a column for
// each of them. With the first mbarrier rows get a column for every thread. The accesses of hardware
// that works on its own have an order, too, so there are more columns: one for the wgmma of each
// warpgroup, whose clock counts its groups, and one for the copies that end in each mbarrier, whose
// clock counts its phases.
class Clocks {
 public:
  void reset(unsigned threads) {
    threads_ = threads;
    width_ = kLanes;
    rows_.assign(threads * kLanes, 0);
    for (unsigned t = 0; t < threads; ++t) at(t, t) = 1;
  }
  bool is_wide() const { return width_ != kLanes; }
  unsigned width() const { return width_; }
  unsigned warpgroup(unsigned g) const { return threads_ + g; }
  unsigned copies(unsigned mbarrier) const { return warpgroup(warpgroups()) + mbarrier; }

  void widen() {
    const std::vector<uint32_t> narrow = std::move(rows_);
    width_ = copies(kMaxMbarriers);
    rows_.assign(std::size_t{width_} * warpgroup(warpgroups()), 0);
    for (unsigned t = 0; t < threads_; ++t) {
      std::copy_n(&narrow[t * kLanes], std::min(kLanes, threads_ - t / kLanes * kLanes),
                  row(t) + t / kLanes * kLanes);
    }
  }

  uint32_t* row(unsigned t) { return &rows_[std::size_t{t} * width_]; }
  uint32_t& at(unsigned t, unsigned s) { return row(t)[is_wide() ? s : s % kLanes]; }
  bool sees(unsigned t, unsigned s, uint32_t clock) {
    return (is_wide() || t / kLanes == s / kLanes) && at(t, s) >= clock;
  }
  // What `from` (a row) has seen is seen by `to`, too.
  void join(uint32_t* to, const uint32_t* from) const {
    for (unsigned s = 0; s < width_; ++s) to[s] = std::max(to[s], from[s]);
  }
  // The warpgroup's wgmma has seen what all its threads have.
  void meet(unsigned g) {
    uint32_t* const to = row(warpgroup(g));
    const uint32_t own = to[warpgroup(g)];
    std::copy_n(row(g * kWarpgroup), width_, to);
    for (unsigned t = 1; t < kWarpgroup; ++t) {
      const uint32_t* const from = row(g * kWarpgroup + t);
      for (unsigned s = 0; s < width_; ++s) to[s] = std::min(to[s], from[s]);
    }
    to[warpgroup(g)] = own;
  }

 private:
  unsigned warpgroups() const { return threads_ / kWarpgroup; }

  unsigned threads_ = 0, width_ = kLanes;
  std::vector<uint32_t> rows_;
};

}  // namespace emulated

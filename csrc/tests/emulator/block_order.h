// Order between the blocks of a launch. There is none, unless they talk through fences and atomics,
// as in "the last block to finish adds the partial results of all".
#pragma once

#include <algorithm>
#include <map>

#include "access.h"

namespace emulated {

// What a block hands on to others with an atomic: the accesses before a fence that comes before
// the atomic, be it the fence of the thread itself or one behind a barrier that joins both.
struct Release {
  std::map<uint32_t, uint64_t> fences;  // thread -> time of its last fence
  uint32_t epoch = 0;                   // everything before this barrier

  bool covers(const Access& a) const {
    if (a.epoch < epoch) return true;
    const auto own = fences.find(a.thread);
    return own != fences.end() && a.time < own->second;
  }
  void add(const Release& other) {
    epoch = std::max(epoch, other.epoch);
    for (const auto& [thread, time] : other.fences) fences[thread] = std::max(fences[thread], time);
  }
};

// A block has seen what other blocks released with earlier atomics on an address on which it has
// executed an atomic itself.
struct BlockOrder {
  uint64_t time = 1;
  struct Fence { uint64_t time; uint32_t epoch; };
  std::map<uint32_t, Fence> fences;  // of the running block, by thread
  std::map<uint32_t, Release> seen;  // by block
  std::map<const void*, std::map<uint32_t, Release>> released;

  // The running block executes an atomic.
  void meet(const void* address, const Access& atomic) {
    auto& others = released[address];
    for (const auto& [block, release] : others) seen[block].add(release);
    Release own;
    for (const auto& [thread, fence] : fences) {
      if (thread != atomic.thread && fence.epoch >= atomic.epoch) continue;
      own.fences[thread] = fence.time;
      own.epoch = std::max(own.epoch, fence.epoch);
    }
    others[atomic.block].add(own);
  }
};

}  // namespace emulated

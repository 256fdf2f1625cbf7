// The samples of one launch, as kernel arguments, and how they are dealt out to blocks.
#pragma once

#include <algorithm>

#include "../../common/expert_groups.h"
#include "../../common/tiling.h"
#include "launch.cuh"

namespace gradsafe {

constexpr int kMaxSamples = 1024;  // of one launch

// A part is samples of one expert, one after the other. x and dy have fewer than 2^31 rows.
struct SampleParts {
  int32_t samples, parts;
  int32_t experts[kMaxSamples];                       // of each part
  int32_t firsts[kMaxSamples + 1];                    // of each part; it ends where the next begins
  int32_t starts[kMaxSamples], lengths[kMaxSamples];  // of each sample
};

// Where the results of a launch's samples go.
struct ResultRows {
  int32_t of[kMaxSamples];
};

// Takes `count` samples that are sorted by expert. Those of one expert are cut into parts until
// there are `enough` blocks, one for every tile and part. One of n parts takes every n-th sample,
// which is fair for sorted lengths.
inline void take_samples(const WgradProblem& p, const int64_t* samples, int64_t count,
                         int64_t tiles, int64_t enough, SampleParts& to, ResultRows& rows) {
  const auto expert = [&](int64_t i) { return p.experts ? p.experts[samples[i]] : 0; };
  int64_t experts = 1;
  for (int64_t i = 1; i < count; ++i) experts += expert(i) != expert(i - 1);
  const int64_t parts_each = ceil_div(enough, std::max<int64_t>(tiles * experts, 1));
  to.samples = static_cast<int32_t>(count);
  to.parts = 0;
  int32_t next = 0;
  for (int64_t first = 0, last = 0; first < count; first = last) {
    while (last < count && expert(last) == expert(first)) ++last;
    const int64_t parts = std::min(parts_each, last - first);
    for (int64_t part = 0; part < parts; ++part) {
      to.experts[to.parts] = static_cast<int32_t>(expert(first));
      to.firsts[to.parts++] = next;
      for (int64_t i = first + part; i < last; i += parts, ++next) {
        to.starts[next] = static_cast<int32_t>(p.starts[samples[i]]);
        to.lengths[next] = static_cast<int32_t>(p.lengths[samples[i]]);
        rows.of[next] = static_cast<int32_t>(samples[i]);
      }
    }
  }
  to.firsts[to.parts] = next;
}

}  // namespace gradsafe

// Samples of a weight gradient problem, by expert. Host code, shared by the CPU and CUDA paths.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "gradsafe/wgrad_moments.h"

namespace gradsafe {

// One group per expert that has samples, in ascending order; without experts all samples are one.
class ExpertGroups {
 public:
  explicit ExpertGroups(const WgradProblem& p) : order_(static_cast<size_t>(p.samples)) {
    std::iota(order_.begin(), order_.end(), int64_t{0});
    const auto expert = [&p](int64_t sample) { return p.experts ? p.experts[sample] : 0; };
    std::stable_sort(order_.begin(), order_.end(),
                     [&](int64_t a, int64_t b) { return expert(a) < expert(b); });
    for (const int64_t& sample : order_) {
      if (groups_.empty() || groups_.back().expert != expert(sample)) {
        groups_.push_back({expert(sample), &sample, 0});
      }
      ++groups_.back().count;
    }
  }
  ExpertGroups(const ExpertGroups&) = delete;  // groups point into the order

  const int64_t* order() const { return order_.data(); }  // group after group
  int64_t size() const { return static_cast<int64_t>(groups_.size()); }
  const SampleGroup& operator[](int64_t group) const {
    return groups_[static_cast<size_t>(group)];
  }

 private:
  std::vector<int64_t> order_;
  std::vector<SampleGroup> groups_;
};

}  // namespace gradsafe

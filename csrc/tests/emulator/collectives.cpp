// Barriers and warp-wide exchanges: what threads do together.
#include <algorithm>
#include <cstring>

#include "access.h"
#include "grid.h"

namespace emulated {
namespace {

bool is_same(const Thread& a, const Thread& b) {
  return a.collective == b.collective && a.mask == b.mask && a.site.line == b.site.line;
}

std::string described(const Thread& t) {
  return std::string(t.collective) + " at " + site_text(t.site);
}

// The running thread and another one wait for each other: they must mean the same thing.
void check_pair(const Thread& self, const Thread& other) {
  const unsigned lane = other.number % kLanes;
  if (other.mask != self.mask) {
    fail("warp mask", described(self) + format(" has mask 0x%08x, lane %u has mask 0x%08x",
                                               self.mask, lane, other.mask));
  }
  if (!is_same(self, other)) {
    fail("warp divergence",
         described(self) + format(", but lane %u waits in ", lane) + described(other));
  }
}

}  // namespace

void barrier(Site site) {
  running()->site = site;
  wait(State::at_barrier);
}

unsigned missing_lanes(const Thread& waiting) {
  unsigned missing = 0;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (!(waiting.mask >> lane & 1)) continue;
    const Thread* peer = thread(waiting.number / kLanes * kLanes + lane);
    const bool there = peer && peer->state == State::at_collective && is_same(*peer, waiting);
    if (!there) missing |= 1u << lane;
  }
  return missing;
}

void warp_collective(const char* name, unsigned mask, void* data, Exchange exchange, Site site) {
  Thread& self = *running();
  const unsigned lane = self.number % kLanes, first = self.number - lane;
  self.collective = name;
  self.mask = mask;
  self.data = data;
  self.site = site;
  if (!(mask >> lane & 1)) {
    fail("warp mask", described(self) + format(": its mask 0x%08x lacks the caller", mask));
  }
  unsigned arrived = 1u << lane;
  void* lanes[kLanes] = {};
  lanes[lane] = data;
  for (unsigned rest = mask & ~arrived; rest != 0; rest &= rest - 1) {
    const unsigned l = static_cast<unsigned>(__builtin_ctz(rest));
    const Thread* other = thread(first + l);
    if (!other) fail("warp mask", described(self) + ": its mask names threads beyond the block");
    if (other->state == State::done) {
      fail("missing lanes", described(self) + format(": lane %u has left the kernel", l));
    }
    if (other->state != State::at_collective || !(other->mask >> lane & 1)) continue;
    check_pair(self, *other);
    arrived |= 1u << l;
    lanes[l] = other->data;
  }
  if (arrived != mask) return wait(State::at_collective);
  if (exchange) exchange(lanes, mask);
  for (unsigned rest = mask & ~(1u << lane); rest != 0; rest &= rest - 1) {
    set_ready(*thread(first + static_cast<unsigned>(__builtin_ctz(rest))));
  }
}

void warp_sync(unsigned mask, Site site) {
  warp_collective("__syncwarp", mask, nullptr, [](void* const (&)[kLanes], unsigned members) {
    Clocks& clocks = block().clocks;
    const unsigned first = running()->number / kLanes * kLanes;
    std::vector<uint32_t> joined(clocks.width());
    for (unsigned t = 0; t < kLanes; ++t) {
      if (members >> t & 1) clocks.join(joined.data(), clocks.row(first + t));
    }
    for (unsigned t = 0; t < kLanes; ++t) {
      if (!(members >> t & 1)) continue;
      std::copy(joined.begin(), joined.end(), clocks.row(first + t));
      ++clocks.at(first + t, first + t);
    }
  }, site);
}

unsigned ballot(const char* name, unsigned mask, bool predicate, Site site) {
  struct Data { bool predicate; unsigned result; } data{predicate, 0};
  warp_collective(name, mask, &data, [](void* const (&lanes)[kLanes], unsigned members) {
    unsigned votes = 0;
    for (unsigned l = 0; l < kLanes; ++l) {
      if (members >> l & 1) votes |= unsigned{static_cast<Data*>(lanes[l])->predicate} << l;
    }
    for (unsigned l = 0; l < kLanes; ++l) {
      if (members >> l & 1) static_cast<Data*>(lanes[l])->result = votes;
    }
  }, site);
  return data.result;
}

void fence() { record_fence(); }

}  // namespace emulated

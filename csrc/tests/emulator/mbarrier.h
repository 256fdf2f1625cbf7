// mbarriers, and the bulk copies that end in them.
#pragma once

#include <cstdint>
#include <vector>

namespace emulated {

struct Mbarrier {
  const char* address;
  unsigned index;        // among those of the block
  unsigned initialiser;  // the thread
  bool fenced;           // the copy engine knows it
  unsigned arrivals;     // that a phase needs
  unsigned missing;      // of them
  int64_t bytes;         // expected, minus copied
  uint32_t phase;
  // Rows of Clocks: what the arrivals of this phase have seen, and those of all earlier ones.
  std::vector<uint32_t> arriving, ended;
  std::vector<unsigned> waiting;  // threads
};

// Called by the grid.
void start_mbarriers();
bool copies_in_flight();
void end_copy(uint64_t which);  // any number
void report_deadlock();         // if a thread waits for an mbarrier or the rest of its warpgroup
void check_leftovers();         // at the end of a block

}  // namespace emulated

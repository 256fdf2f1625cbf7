// Who touched which bytes, and whether two touches are ordered: the race and initialisation
// checks of shared and global memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace emulated {

// One access, and the point in the order of its block at which it happened.
struct Access {
  uint32_t block = 0;   // running number over all launches; 0: none
  uint32_t thread = 0;  // linear, within the block
  uint32_t epoch = 0;   // barriers of the block before it
  uint32_t clock = 0;   // __syncwarp calls of its lane before it, plus one
  uint64_t time = 0;    // running count of fences: orders blocks that talk through atomics
  const void* code = nullptr;  // return address, for the report
  bool atomic = false;
  bool in_flight = false;  // the destination of an asynchronous copy nobody has waited for
};

// The memory of one granule. Two readers that are not ordered suffice: whoever writes next is at
// most one of them. A reader is replaced only by one that comes after it in the order.
struct Cell {
  Access writer;
  Access readers[2];
};

// Smallest memory that two threads may write independently. fp8 and byte results need 1 here.
constexpr std::size_t kGranule = 2;

std::unique_ptr<Cell[]> make_cells(std::size_t bytes);

enum class Touch { read, write, atomic, start_copy };
void check_access(const void* address, std::size_t bytes, std::size_t alignment, Touch touch,
                  const void* code);

// Called by the grid.
void start_launch(const void* kernel);
void start_block();
void record_fence();

}  // namespace emulated

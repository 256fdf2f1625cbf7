// Who touched which bytes, and whether two touches are ordered: the race and initialisation
// checks of shared and global memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace emulated {

// One access, and the point in the order of its block at which it happened.
struct Access {
  uint32_t block = 0;   // running number over all launches; 0: none
  uint32_t thread = 0;  // linear, within the block; or another column of Clocks
  uint32_t epoch = 0;   // barriers of the block before it
  uint32_t clock = 0;   // of its thread
  uint64_t time = 0;    // running count of fences: orders blocks that talk through atomics
  const void* code = nullptr;  // return address, for the report
  bool atomic = false;
  bool in_flight = false;  // the destination of an asynchronous copy nobody has waited for
  uint32_t proxy_fences = 0;  // fence.proxy.async of its thread before it
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

// async_read and start_bulk: by wgmma and the copy engine, behind the async proxy.
enum class Touch { read, write, atomic, start_copy, end_copy, async_read, start_bulk };
void check_access(const void* address, std::size_t bytes, std::size_t alignment, Touch touch,
                  const void* code);
// The same for one that `thread`, a column of Clocks, makes.
void check_access_of(unsigned thread, const void* address, std::size_t bytes, std::size_t alignment,
                     Touch touch, const void* code);
// The bytes that a bulk copy has written, in its phase of an mbarrier.
void end_bulk(const void* address, std::size_t bytes, const Access& copy);

// Shared memory by 32-bit numbers, as instructions of compute capability 9.0 take them.
uint32_t shared_number(const void* address);
char* shared_pointer(uint32_t number);
// Where the 128-byte swizzle puts the 16 bytes at `number`.
inline uint32_t swizzled(uint32_t number) { return number ^ (number >> 7 & 7) << 4; }
std::string place_name(const void* address, std::size_t bytes);  // for reports

// Called by the grid.
void start_launch(const void* kernel);
void start_block();
void record_fence();

}  // namespace emulated

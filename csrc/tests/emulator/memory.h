// Global memory of the emulated device. Every allocation has a guard zone on both sides, starts
// at the same address under every schedule, and is known by name in reports.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace emulated {

struct Cell;  // who last touched a few neighbouring bytes; see access.h

enum class Kind {
  input,      // read only; writing to it is an error
  inout,      // initialised, read and written
  output,     // poisoned with NaN; must be written before it is read
  workspace,  // as output, but no result
};

struct Allocation {
  std::string name;
  Kind kind;
  char* begin;
  std::size_t bytes;
  std::unique_ptr<Cell[]> cells;  // none for inputs: they are read by all and written by no one
};

constexpr unsigned char kPoison = 0xff;  // NaN in every float format, -1 in every integer

class DeviceMemory {
 public:
  static DeviceMemory& get();

  // `offset` bytes (below 256) past a 256-byte border, so that unaligned views can be rebuilt.
  char* allocate(const std::string& name, Kind kind, std::size_t bytes, std::size_t offset = 0);
  void release_all();

  bool contains(const void* address) const {
    return static_cast<std::size_t>(static_cast<const char*>(address) - arena_) < kArenaBytes;
  }
  // The allocation at `address` or, for an address in a guard zone, the nearest; null if none.
  Allocation* find(const void* address);
  const std::vector<std::unique_ptr<Allocation>>& allocations() const { return allocations_; }

 private:
  static constexpr std::size_t kArenaBytes = std::size_t{16} << 30;  // of address space, not memory
  static constexpr std::size_t kGuardBytes = 64 << 10;

  DeviceMemory();
  char* arena_;
  std::size_t used_ = 0;
  std::vector<std::unique_ptr<Allocation>> allocations_;
  std::vector<uint32_t> owner_;  // per kGuardBytes of the arena: index of the allocation, plus one
};

}  // namespace emulated

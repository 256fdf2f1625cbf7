// What lies at an address of device memory, and how reports call it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "access.h"
#include "grid.h"
#include "memory.h"
#include "symbols.h"

namespace emulated {

// Where device memory lies. Hooks are called for every access: this must be quick.
struct Ranges {
  const char* segment = nullptr;  // of shared variables, as `dynamic` with its guard zones
  std::size_t segment_bytes = 0;
  const char* dynamic = nullptr;
  const DeviceMemory* memory = nullptr;

  bool is_global(const char* p) const { return memory->contains(p); }
  bool is_shared(const char* p) const {
    return static_cast<std::size_t>(p - segment) < segment_bytes + 2 * kSharedGuard ||
           static_cast<std::size_t>(p - dynamic) < kMaxDynamicShared + 2 * kSharedGuard;
  }
};

inline const Ranges& ranges() {
  static const Ranges only{Symbols::get().shared_begin - kSharedGuard, Symbols::get().shared_bytes,
                           dynamic_shared_begin() - kSharedGuard, &DeviceMemory::get()};
  return only;
}

// What lies at an address. Text is made only for a report: this is built at every access.
struct Place {
  Cell* cells = nullptr;  // null where nothing is recorded
  std::size_t cell_offset = 0;
  std::size_t offset = 0;  // within the variable or allocation, if there is one
  const Variable* variable = nullptr;
  const Allocation* allocation = nullptr;
  bool is_shared = false;
};

// `address` lies in global or shared memory; bytes outside of what the kernel may touch are reported.
Place find_global(const char* address, std::size_t bytes, Touch touch, const void* code);
Place find_shared(const char* address, std::size_t bytes, Touch touch, const void* code);

std::string describe(const Place& place, std::size_t bytes);
std::string at_line(const void* code);  // " (file:line)" or nothing
[[noreturn]] void report(const char* kind, const Place& place, std::size_t bytes, Touch touch,
                         const void* code, const std::string& more = "");

void start_places(const void* kernel);  // of the shared variables it declares
void poison_shared_variables();

}  // namespace emulated

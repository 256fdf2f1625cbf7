#include "places.h"

#include <cstring>
#include <memory>
#include <vector>

#include "common/device.cuh"

namespace emulated {
namespace {

// Shared memory as one space: the variables' segment, and the dynamic part.
struct SharedSpace {
  std::unique_ptr<Cell[]> segment_cells, dynamic_cells;
  std::vector<const Variable*> variables;  // of the running kernel
} shared;

// As on a device, dynamic shared memory lies behind something and below 2^18, where the operands of
// wgmma must be. Shared variables, whose size over all kernels has no bound, lie above here.
constexpr uint32_t kDynamicNumber = 0x480, kStaticNumber = 1u << 18;

const char* verb_of(Touch touch) {
  switch (touch) {
    case Touch::read: return "reads ";
    case Touch::write: return "writes ";
    case Touch::atomic: return "updates ";
    case Touch::end_copy: return "ends a copy to ";
    case Touch::async_read: return "wgmma reads ";
    default: return "starts a copy to ";
  }
}

[[noreturn]] void report_bounds(std::size_t bytes, Touch touch, const void* code,
                                const std::string& where) {
  fail("out of bounds",
       std::string(verb_of(touch)) + std::to_string(bytes) + " bytes" + at_line(code) + where);
}

}  // namespace

std::string describe(const Place& place, std::size_t bytes) {
  std::string text = std::to_string(bytes) + " bytes at byte " + std::to_string(place.offset) +
                     " of ";
  if (place.variable) return text + "shared variable `" + place.variable->name + "`";
  if (place.allocation) {
    return text + place.allocation->name + " (" + std::to_string(place.allocation->bytes) +
           " bytes)";
  }
  return text + "dynamic shared memory";
}

std::string at_line(const void* code) {
  const std::string line = source_line(code);
  return line.empty() ? "" : " (" + line + ")";
}

[[noreturn]] void report(const char* kind, const Place& place, std::size_t bytes, Touch touch,
                         const void* code, const std::string& more) {
  fail(kind, verb_of(touch) + describe(place, bytes) + at_line(code) + more);
}

Place find_shared(const char* address, std::size_t bytes, Touch touch, const void* code) {
  Place place;
  place.is_shared = true;
  const std::size_t in_dynamic = static_cast<std::size_t>(address - dynamic_shared_begin());
  if (in_dynamic < dynamic_shared_bytes()) {
    place.cells = shared.dynamic_cells.get();
    place.offset = place.cell_offset = in_dynamic;
    if (in_dynamic + bytes <= dynamic_shared_bytes()) return place;
  }
  if (in_dynamic + kSharedGuard < kMaxDynamicShared + 2 * kSharedGuard) {
    const std::string offset = std::to_string(address - dynamic_shared_begin());
    report_bounds(bytes, touch, code,
                  ", at byte " + offset + " of dynamic shared memory, which has " +
                      std::to_string(dynamic_shared_bytes()));
  }
  for (const Variable* v : shared.variables) {
    if (address < v->begin || address >= v->begin + v->bytes) continue;
    place.cells = shared.segment_cells.get();
    place.cell_offset = static_cast<std::size_t>(address - Symbols::get().shared_begin);
    place.variable = v;
    place.offset = static_cast<std::size_t>(address - v->begin);
    if (place.offset + bytes <= v->bytes) return place;
  }
  std::string where = " of shared memory outside of this kernel's variables";
  for (const Variable* v : shared.variables) {
    where += "; `" + v->name + "` has " + std::to_string(v->bytes) +
             " bytes, the access is at byte " + std::to_string(address - v->begin);
  }
  report_bounds(bytes, touch, code, where);
}

Place find_global(const char* address, std::size_t bytes, Touch touch, const void* code) {
  Place place;
  place.allocation = DeviceMemory::get().find(address);
  if (!place.allocation) report_bounds(bytes, touch, code, " of no allocation");
  const Allocation& a = *place.allocation;
  const std::ptrdiff_t offset = address - a.begin;
  if (offset < 0 || static_cast<std::size_t>(offset) + bytes > a.bytes) {
    report_bounds(bytes, touch, code, ", at byte " + std::to_string(offset) + " of " + a.name +
                                          ", which has " + std::to_string(a.bytes));
  }
  place.offset = place.cell_offset = static_cast<std::size_t>(offset);
  place.cells = a.cells.get();
  if (a.kind == Kind::input && touch != Touch::read) {
    report("written input", place, bytes, touch, code, ", which is read only");
  }
  return place;
}

uint32_t shared_number(const void* address) {
  const char* const p = static_cast<const char*>(address);
  if (!ranges().is_shared(p)) fail("shared address", "the pointer is none to shared memory");
  const bool dynamic =
      static_cast<std::size_t>(p - dynamic_shared_begin()) < kMaxDynamicShared + kSharedGuard;
  return static_cast<uint32_t>(dynamic ? kDynamicNumber + (p - dynamic_shared_begin())
                                       : kStaticNumber + (p - Symbols::get().shared_begin));
}

char* shared_pointer(uint32_t number) {
  return number < kStaticNumber ? dynamic_shared_begin() + (int64_t{number} - kDynamicNumber)
                                : Symbols::get().shared_begin + (number - kStaticNumber);
}

std::string place_name(const void* address, std::size_t bytes) {
  const char* const begin = static_cast<const char*>(address);
  return describe(find_shared(begin, bytes, Touch::atomic, nullptr), bytes);
}

void start_places(const void* kernel) {
  const Symbols& symbols = Symbols::get();
  if (!shared.segment_cells) {
    shared.segment_cells = make_cells(symbols.shared_bytes);
    shared.dynamic_cells = make_cells(kMaxDynamicShared);
  }
  shared.variables.clear();
  const std::string name = symbols.mangled_name(kernel);
  const std::string prefix = name.size() > 2 ? "_ZZ" + name.substr(2) + "E" : "";
  std::size_t bytes = 0;
  for (const Variable& v : symbols.variables) {
    if (prefix.empty() || v.function.rfind(prefix, 0) != 0) continue;
    shared.variables.push_back(&v);
    bytes += v.bytes;
  }
  if (bytes > 48 << 10) fail("launch", "more than 48 KiB of static shared memory");
  gradsafe::DeviceLimits limits;
  (void)gradsafe::device_limits(limits);
  if (bytes + dynamic_shared_bytes() > static_cast<std::size_t>(limits.shared_bytes)) {
    fail("launch", "more shared memory than the device has for a block");
  }
}

void poison_shared_variables() {
  for (const Variable* v : shared.variables) std::memset(v->begin, kPoison, v->bytes);
}

}  // namespace emulated

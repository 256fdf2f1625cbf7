#include "access.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "block_order.h"
#include "grid.h"
#include "memory.h"
#include "symbols.h"
#include "common/device.cuh"

extern "C" __attribute__((weak)) void __asan_init();

namespace emulated {
namespace {

// Under AddressSanitizer only intrinsics report their accesses: what looks unwritten may have been
// written by a plain store.
const bool sees_plain_stores = __asan_init == nullptr;

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

const Ranges& ranges() {
  static const Ranges only{Symbols::get().shared_begin - kSharedGuard, Symbols::get().shared_bytes,
                           dynamic_shared_begin() - kSharedGuard, &DeviceMemory::get()};
  return only;
}

// Shared memory as one space: the variables' segment, and the dynamic part.
struct SharedSpace {
  std::unique_ptr<Cell[]> segment_cells, dynamic_cells;
  std::vector<const Variable*> variables;  // of the running kernel
} shared;

BlockOrder order;

// As on a device, dynamic shared memory lies behind something and below 2^18, where the operands of
// wgmma must be. Shared variables, whose size over all kernels has no bound, lie above here.
constexpr uint32_t kDynamicNumber = 0x480, kStaticNumber = 1u << 18;

// How far `now` has seen the block and lane of `before`.
bool is_ordered(const Access& before, const Access& now) {
  if (before.block < block().launch_first) return true;  // launches of a stream follow each other
  if (before.block != now.block) {
    const auto seen = order.seen.find(before.block);
    return seen != order.seen.end() && seen->second.covers(before);
  }
  if (before.thread == now.thread || before.epoch < now.epoch) return true;
  return block().clocks.sees(now.thread, before.thread, before.clock);
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

[[noreturn]] void report(const char* kind, const Place& place, std::size_t bytes, Touch touch,
                         const void* code, const std::string& more = "") {
  fail(kind, verb_of(touch) + describe(place, bytes) + at_line(code) + more);
}

std::string name_of(unsigned thread) {
  const Clocks& clocks = block().clocks;
  if (thread < clocks.warpgroup(0)) return "thread " + std::to_string(thread);
  if (thread >= clocks.copies(0)) return "the copy engine";
  return "a wgmma of warpgroup " + std::to_string(thread - clocks.warpgroup(0));
}

[[noreturn]] void report_race(const Place& place, std::size_t bytes, Touch touch, const Access& now,
                              const Access& before, const char* verb) {
  std::string more = "\n  " + name_of(before.thread);
  if (before.block != now.block) {
    more += " of another block (the " + std::to_string(before.block - block().launch_first + 1) +
            ". to run)";
  }
  more += std::string(" ") + (before.in_flight ? "copies to" : verb) + " it" + at_line(before.code);
  more += before.block == now.block ? " with no barrier between them"
                                    : " and blocks of a launch have no order";
  report("race", place, bytes, touch, now.code, more);
}

bool behind_async_proxy(Touch touch) {
  return touch == Touch::async_read || touch == Touch::start_bulk;
}

// Whether the writer has called fence_async_proxy since, and `now` has seen that.
bool is_fenced(const Access& writer, const Access& now) {
  const Thread* by = thread(writer.thread);
  if (!by) return true;  // written behind the async proxy itself
  if (writer.proxy_fences >= by->proxy_fences.size()) return false;
  Access fence = writer;
  fence.epoch = by->proxy_fences[writer.proxy_fences].epoch;
  fence.clock = by->proxy_fences[writer.proxy_fences].clock;
  return is_ordered(fence, now);
}

void check_cell(Cell& cell, const Place& place, std::size_t bytes, Touch touch, const Access& now) {
  const bool stale = place.is_shared && cell.writer.block != now.block;
  const bool unwritten = cell.writer.block == 0 || stale;
  const bool reads = touch == Touch::read || touch == Touch::async_read;
  if (unwritten) {
    const bool initialised = place.allocation && place.allocation->kind == Kind::inout;
    if (reads && !initialised && sees_plain_stores) {
      report("uninitialised", place, bytes, touch, now.code, ", which nobody has written");
    }
  } else {
    const bool both_atomic = cell.writer.atomic && now.atomic;
    if (!both_atomic && !is_ordered(cell.writer, now)) {
      report_race(place, bytes, touch, now, cell.writer, "writes");
    }
    if (cell.writer.in_flight && touch != Touch::end_copy) {
      report(reads ? "uninitialised" : "overwritten copy", place, bytes, touch, now.code,
             ", to which an asynchronous copy is still in flight");
    }
    if (behind_async_proxy(touch) && !is_fenced(cell.writer, now)) {
      report("missing fence", place, bytes, touch, now.code,
             "\n  " + name_of(cell.writer.thread) + " writes it" + at_line(cell.writer.code) +
                 " and does not call fence_async_proxy afterwards");
    }
  }
  if (reads) {
    for (Access& reader : cell.readers) {
      if ((place.is_shared && reader.block != now.block) || is_ordered(reader, now)) {
        reader = now;
        return;
      }
    }
    return;
  }
  for (const Access& reader : cell.readers) {
    if (place.is_shared && reader.block != now.block) continue;
    if (!(reader.atomic && now.atomic) && !is_ordered(reader, now)) {
      report_race(place, bytes, touch, now, reader, "reads");
    }
  }
  cell.writer = now;
  cell.readers[0] = cell.readers[1] = Access{};
}

[[noreturn]] void report_bounds(std::size_t bytes, Touch touch, const void* code,
                                const std::string& where) {
  fail("out of bounds",
       std::string(verb_of(touch)) + std::to_string(bytes) + " bytes" + at_line(code) + where);
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

}  // namespace

std::unique_ptr<Cell[]> make_cells(std::size_t bytes) {
  return std::unique_ptr<Cell[]>(new Cell[bytes / kGranule + 2]);
}

void check_access(const void* address, std::size_t bytes, std::size_t alignment, Touch touch,
                  const void* code) {
  check_access_of(running() ? running()->number : 0, address, bytes, alignment, touch, code);
}

void check_access_of(unsigned actor, const void* pointer, std::size_t bytes, std::size_t alignment,
                     Touch touch, const void* code) {
  const char* address = static_cast<const char*>(pointer);
  const bool global = ranges().is_global(address);
  // Anything else is registers, local memory and arguments of one thread.
  if (!global && !ranges().is_shared(address)) return;
  if (!running()) {
    if (global) fail("host access", "host code touches device memory" + at_line(code));
    return;
  }
  const Place place = global ? find_global(address, bytes, touch, code)
                             : find_shared(address, bytes, touch, code);
  if (reinterpret_cast<std::size_t>(address) % alignment != 0) {
    report("misaligned", place, bytes, touch, code,
           "; the address must be a multiple of " + std::to_string(alignment));
  }
  if (!place.cells) return;
  Access now;
  now.block = block().number;
  now.thread = actor;
  now.epoch = block().epoch;
  now.clock = block().clocks.at(actor, actor);
  now.time = order.time;
  now.code = code;
  now.atomic = touch == Touch::atomic;
  now.in_flight = touch == Touch::start_copy || touch == Touch::start_bulk;
  now.proxy_fences = static_cast<uint32_t>(running()->proxy_fences.size());
  const std::size_t last = (place.cell_offset + bytes - 1) / kGranule;
  for (std::size_t i = place.cell_offset / kGranule; i <= last; ++i) {
    check_cell(place.cells[i], place, bytes, touch, now);
  }

  if (touch == Touch::atomic && global) order.meet(address, now);
}

void end_bulk(const void* address, std::size_t bytes, const Access& copy) {
  const Place place = find_shared(static_cast<const char*>(address), bytes, Touch::end_copy, copy.code);
  for (std::size_t i = 0; i < bytes / kGranule; ++i) {
    Cell& cell = place.cells[place.cell_offset / kGranule + i];
    cell.writer = copy;
    cell.readers[0] = cell.readers[1] = Access{};
  }
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
  return describe(find_shared(static_cast<const char*>(address), bytes, Touch::atomic, nullptr), bytes);
}

void start_launch(const void* kernel) {
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
  order.released.clear();
}

void start_block() {
  for (const Variable* v : shared.variables) std::memset(v->begin, kPoison, v->bytes);
  order.fences.clear();
  order.seen.clear();
}

void record_fence() { order.fences[running()->number] = {++order.time, block().epoch}; }

void check(const void* address, std::size_t bytes, std::size_t alignment, Use use,
           const void* code) {
  const Touch touch = use == Use::read    ? Touch::read
                      : use == Use::write ? Touch::write
                                          : Touch::atomic;
  check_access(address, bytes, alignment, touch, code);
}

}  // namespace emulated

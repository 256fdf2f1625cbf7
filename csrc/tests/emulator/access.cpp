#include "access.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "block_order.h"
#include "grid.h"
#include "places.h"

extern "C" __attribute__((weak)) void __asan_init();

namespace emulated {
namespace {

// Under AddressSanitizer only intrinsics report their accesses: what looks unwritten may have been
// written by a plain store.
const bool sees_plain_stores = __asan_init == nullptr;

BlockOrder order;

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
    // A thread's cp.async may follow another one to the same place.
    const bool in_turn = touch == Touch::start_copy || touch == Touch::end_copy;
    if (cell.writer.in_flight && !in_turn) {
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
  const char* const begin = static_cast<const char*>(address);
  const Place place = find_shared(begin, bytes, Touch::end_copy, copy.code);
  for (std::size_t i = 0; i < bytes / kGranule; ++i) {
    Cell& cell = place.cells[place.cell_offset / kGranule + i];
    cell.writer = copy;
    cell.readers[0] = cell.readers[1] = Access{};
  }
}

void start_launch(const void* kernel) {
  start_places(kernel);
  order.released.clear();
}

void start_block() {
  poison_shared_variables();
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

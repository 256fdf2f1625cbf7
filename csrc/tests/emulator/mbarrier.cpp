#include "mbarrier.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>

#include "../emulated_hopper.h"
#include "access.h"
#include "grid.h"
#include "memory.h"

namespace emulated {
namespace {

constexpr std::size_t kWordBytes = 8;
constexpr int kRowBytes = 128;

struct BoxCopy {
  uint32_t to;
  CUtensorMap map;
  int from[3];
  Mbarrier* barrier;
  Access writer;  // as which the bytes count from its end on

  int rows() const { return static_cast<int>(map.box[1]); }
  uint32_t bytes() const { return map.box[1] * kRowBytes; }
  // Bytes of a row of the box that lie in the tensor, and where they begin.
  int valid_bytes(int row) const {
    const auto is_inside = [&](int dimension, int64_t at) {
      return at >= 0 && at < static_cast<int64_t>(map.sizes[dimension]);
    };
    if (from[0] < 0) fail("bulk copy", "boxes that begin before the first column are not emulated");
    if (!is_inside(0, from[0]) || !is_inside(1, int64_t{from[1]} + row) || !is_inside(2, from[2])) {
      return 0;
    }
    const int64_t left = (static_cast<int64_t>(map.sizes[0]) - from[0]) * map.element_bytes;
    return static_cast<int>(std::min<int64_t>(left, kRowBytes));
  }
  const char* source(int row) const {
    return map.data + int64_t{from[0]} * map.element_bytes +
           (int64_t{from[1]} + row) * static_cast<int64_t>(map.strides[0]) +
           from[2] * static_cast<int64_t>(map.strides[1]);
  }
};

std::vector<std::unique_ptr<Mbarrier>> barriers;
std::vector<BoxCopy> copies;

// `code` uses the barrier's word, which is atomic: other accesses to it are races.
Mbarrier& find(uint32_t number, const void* code) {
  const char* const address = shared_pointer(number);
  check_access(address, kWordBytes, kWordBytes, Touch::atomic, code);
  for (const auto& b : barriers) {
    if (b->address == address) return *b;
  }
  fail("mbarrier", place_name(address, kWordBytes) + " are no mbarrier: nobody has initialised it");
}

void end_phase_if_complete(Mbarrier& b) {
  if (b.missing != 0 || b.bytes != 0) return;
  Clocks& clocks = block().clocks;
  clocks.join(b.ended.data(), b.arriving.data());
  std::fill(b.arriving.begin(), b.arriving.end(), 0u);
  b.ended[clocks.copies(b.index)] = ++b.phase;
  b.missing = b.arrivals;
  for (const unsigned t : b.waiting) set_ready(*thread(t));
  b.waiting.clear();
}

std::string wait_text(const Thread& t) {
  if (t.state == State::at_warpgroup) {
    return "in " + std::string(t.collective) + " of its warpgroup at " + site_text(t.site);
  }
  const Mbarrier& b = *t.mbarrier;
  return "at " + site_text(t.site) + " for phase " + std::to_string(b.phase) +
         " of the mbarrier, " + place_name(b.address, kWordBytes) + ", which lacks " +
         std::to_string(b.missing) + " of " + std::to_string(b.arrivals) + " arrivals and " +
         std::to_string(b.bytes) + " bytes of copies";
}

}  // namespace

void start_mbarriers() {
  barriers.clear();
  copies.clear();
}
bool copies_in_flight() { return !copies.empty(); }

void report_deadlock() {
  std::string text, last;
  for (unsigned i = 0; i < block().threads; ++i) {
    const Thread& t = *thread(i);
    if (t.state != State::at_mbarrier && t.state != State::at_warpgroup) continue;
    const std::string line = wait_text(t);
    if (line != last) text += "\n  thread " + std::to_string(i) + " waits " + line;
    last = line;
  }
  if (!text.empty()) fail("deadlock", "no thread can run:" + text);
}

void check_leftovers() {
  if (!copies.empty()) fail("bulk copy", "the block ends while a copy is still in flight");
  for (unsigned i = 0; i < block().threads; ++i) {
    if (!thread(i)->products.empty()) {
      fail("wgmma", "thread " + std::to_string(i) + " ends without waiting for its products");
    }
  }
}

uint32_t shared_address(const void* p) { return shared_number(p); }

void mbarrier_init(uint32_t barrier, int arrivals) {
  const char* const address = shared_pointer(barrier);
  check_access(address, kWordBytes, kWordBytes, Touch::write, __builtin_return_address(0));
  if (arrivals < 1) fail("mbarrier", "the number of arrivals must be positive");
  Clocks& clocks = block().clocks;
  if (!clocks.is_wide()) clocks.widen();
  for (const auto& b : barriers) {
    if (b->address == address) fail("mbarrier", "the mbarrier is initialised twice");
  }
  if (barriers.size() == kMaxMbarriers) fail("mbarrier", "too many mbarriers for the emulation");
  const unsigned count = static_cast<unsigned>(arrivals);
  const std::vector<uint32_t> unseen(clocks.width());
  barriers.emplace_back(new Mbarrier{address, static_cast<unsigned>(barriers.size()),
                                     running()->number, false, count, count, 0, 0, unseen, unseen,
                                     {}});
}

void mbarrier_init_fence() {
  for (const auto& b : barriers) b->fenced |= b->initialiser == running()->number;
}

void mbarrier_arrive(uint32_t barrier, int expected_bytes) {
  Mbarrier& b = find(barrier, __builtin_return_address(0));
  if (b.missing == 0) {
    fail("mbarrier", place_name(b.address, kWordBytes) + ": more arrivals than the phase needs");
  }
  Clocks& clocks = block().clocks;
  const unsigned self = running()->number;
  clocks.join(b.arriving.data(), clocks.row(self));
  ++clocks.at(self, self);
  b.bytes += expected_bytes;
  --b.missing;
  end_phase_if_complete(b);
}

void mbarrier_wait(uint32_t barrier, uint32_t parity, Site site) {
  Mbarrier& b = find(barrier, __builtin_return_address(0));
  Thread& self = *running();
  if (parity > 1) fail("mbarrier", "a parity is 0 or 1");
  while (b.phase % 2 == parity) {
    self.site = site;
    self.mbarrier = &b;
    b.waiting.push_back(self.number);
    wait(State::at_mbarrier);
  }
  block().clocks.join(block().clocks.row(self.number), b.ended.data());
}

void copy_box(uint32_t to, const CUtensorMap* map, const int (&from)[3], uint32_t barrier) {
  const void* const code = __builtin_return_address(0);
  Mbarrier& b = find(barrier, code);
  if (!b.fenced) fail("missing fence", "the copy engine does not know the mbarrier: no "
                                       "mbarrier_init_fence follows its initialisation");
  if (reinterpret_cast<std::size_t>(map) % alignof(CUtensorMap) != 0) {
    fail("bulk copy", "the tensor map must lie at a multiple of 64 bytes");
  }
  BoxCopy copy{to, *map, {from[0], from[1], from[2]}, &b, {}};
  copy.writer.block = block().number;
  copy.writer.thread = block().clocks.copies(b.index);
  copy.writer.epoch = block().epoch;
  copy.writer.clock = b.phase + 1;
  copy.writer.code = code;
  char* const begin = shared_pointer(to);
  check_access(begin, copy.bytes(), kRowBytes, Touch::start_bulk, code);
  std::memset(begin, kPoison, copy.bytes());
  for (int row = 0; row < copy.rows(); ++row) {
    if (const int bytes = copy.valid_bytes(row)) {
      check_access(copy.source(row), static_cast<std::size_t>(bytes), 1, Touch::read, code);
    }
  }
  copies.push_back(copy);
  if (schedule().order == Schedule::Order::reverse) end_copy(0);
}

void end_copy(uint64_t which) {
  const std::size_t index = which % copies.size();
  const BoxCopy copy = copies[index];
  copies.erase(copies.begin() + static_cast<std::ptrdiff_t>(index));
  Mbarrier& b = *copy.barrier;
  if (b.phase + 1 != copy.writer.clock) {
    fail("bulk copy", "the phase of the mbarrier, " + place_name(b.address, kWordBytes) +
                          ", ended before a copy that belongs to it: it expected too few bytes");
  }
  for (int row = 0; row < copy.rows(); ++row) {
    char bytes[kRowBytes] = {};  // what lies outside the tensor reads as zero
    std::memcpy(bytes, copy.source(row), static_cast<std::size_t>(copy.valid_bytes(row)));
    const uint32_t to = copy.to + static_cast<uint32_t>(row) * kRowBytes;
    for (uint32_t chunk = 0; chunk < 8; ++chunk) {
      std::memcpy(shared_pointer(swizzled(to + chunk * 16)), bytes + chunk * 16, 16);
    }
  }
  end_bulk(shared_pointer(copy.to), copy.bytes(), copy.writer);
  b.bytes -= copy.bytes();
  end_phase_if_complete(b);
}

void store_shared_zeros(uint32_t to) {
  char* const p = shared_pointer(to);
  check_access(p, 16, 16, Touch::write, __builtin_return_address(0));
  std::memset(p, 0, 16);
}

void fence_async_proxy() {
  Thread& self = *running();
  self.proxy_fences.push_back(
      {block().epoch, block().clocks.at(self.number, self.number)});
}

CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                      const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                      CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const auto refuse = [](bool wrong, const char* why) {
    if (wrong) fail("tensor map", why);
  };
  refuse(rank != 3 || swizzle != CU_TENSOR_MAP_SWIZZLE_128B,
         "only maps of three dimensions with 128-byte swizzle are emulated");
  refuse(reinterpret_cast<std::size_t>(data) % 16 != 0, "the data must lie at a multiple of 16");
  map->element_bytes = type == CU_TENSOR_MAP_DATA_TYPE_UINT8     ? 1
                       : type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4
                                                                 : 2;
  for (int i = 0; i < 3; ++i) {
    refuse(sizes[i] == 0 || sizes[i] > uint64_t{1} << 32, "a size must lie in [1, 2^32]");
    refuse(box[i] == 0 || box[i] > 256, "a size of the box must lie in [1, 256]");
    refuse(steps[i] != 1, "only steps of one element are emulated");
    map->sizes[i] = sizes[i];
    map->box[i] = box[i];
  }
  for (int i = 0; i < 2; ++i) {
    refuse(strides[i] % 16 != 0, "a stride must be a multiple of 16 bytes");
    refuse(strides[i] >= uint64_t{1} << 40, "a stride must be below 2^40 bytes");
    map->strides[i] = strides[i];
  }
  refuse(box[0] * map->element_bytes > kRowBytes, "a row of a swizzled box has at most 128 bytes");
  refuse(box[0] * map->element_bytes != kRowBytes || box[2] != 1,
         "only boxes of one matrix with rows of 128 bytes are emulated");
  map->data = static_cast<const char*>(data);
  return CUDA_SUCCESS;
}

}  // namespace emulated

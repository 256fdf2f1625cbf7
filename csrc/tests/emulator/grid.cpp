#include "grid.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>

#include "access.h"
#include "mbarrier.h"
#include "memory.h"
#include "symbols.h"

uint3 threadIdx{}, blockIdx{};
dim3 blockDim, gridDim;

namespace emulated {
namespace {

// Limits of compute capability 8.0 and later.
constexpr std::size_t kMaxThreads = 1024, kMaxGridYZ = 65535;
constexpr std::size_t kMaxParameterBytes = 32764;

struct Running {
  Schedule schedule;
  uint64_t random_state = 1;
  std::string case_name;
  std::string kernel;
  const std::function<void()>* body = nullptr;
  std::vector<std::unique_ptr<Thread>> threads;  // fibers are kept from block to block
  std::vector<uint64_t> ready;                   // one bit per thread
  Thread* current = nullptr;
  Block block;
  std::vector<char> shared = std::vector<char>(kMaxDynamicShared + 2 * kSharedGuard + 128);
  std::size_t shared_bytes = 0;
  std::vector<LaunchRecord> log;
} now;

uint64_t next_random() {
  uint64_t x = now.random_state += 0x9e3779b97f4a7c15u;  // splitmix64
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

void run_thread() {
  (*now.body)();
  wait(State::done);
}

// The ready thread whose turn it is, or null. Forward lets a warp run to its barrier before the
// next one starts, reverse does so from the last warp on; random mixes at every step.
Thread* choose() {
  const std::size_t words = now.ready.size();
  std::size_t start = 0;
  unsigned rotation = 0;
  if (now.schedule.order == Schedule::Order::random) {
    const uint64_t r = next_random();
    start = r % words;
    rotation = (r >> 32) % 64;
  }
  for (std::size_t i = 0; i < words; ++i) {
    std::size_t w = (start + i) % words;
    if (now.schedule.order == Schedule::Order::reverse) w = words - 1 - i;
    const uint64_t bits = now.ready[w];
    if (bits == 0) continue;
    unsigned bit;
    if (now.schedule.order == Schedule::Order::reverse) {
      bit = 63 - __builtin_clzll(bits);
    } else {
      const uint64_t rotated = rotation ? bits >> rotation | bits << (64 - rotation) : bits;
      bit = (__builtin_ctzll(rotated) + rotation) % 64;
    }
    return now.threads[w * 64 + bit].get();
  }
  return nullptr;
}

// No thread can run. Either all stand at one barrier, or the kernel hangs on hardware.
void release_barrier() {
  Thread* first = nullptr;
  const Thread* finished = nullptr;
  for (unsigned i = 0; i < now.block.threads; ++i) {
    Thread& t = *now.threads[i];
    if (t.state == State::at_collective) {
      now.current = &t;
      const unsigned missing = missing_lanes(t);
      fail("missing lanes", std::string(t.collective) + " at " + site_text(t.site) +
                                format(" with mask 0x%08x waits forever for lanes 0x%08x", t.mask,
                                       missing));
    }
    if (t.state == State::done) finished = &t;
    if (t.state == State::at_barrier && !first) first = &t;
  }
  now.current = first;
  if (finished) {
    fail("divergent barrier", "it waits at the barrier of " + site_text(first->site) +
                                  format(", but thread %u has left the kernel", finished->number));
  }
  for (unsigned i = 0; i < now.block.threads; ++i) {
    const Thread& t = *now.threads[i];
    if (t.site.line != first->site.line || std::strcmp(t.site.file, first->site.file) != 0) {
      fail("divergent barrier", "it waits at the barrier of " + site_text(first->site) +
                                    format(", but thread %u at that of ", t.number) +
                                    site_text(t.site));
    }
  }
  now.current = nullptr;
  ++now.block.epoch;
  for (unsigned i = 0; i < now.block.threads; ++i) set_ready(*now.threads[i]);
}

void run_block(uint64_t linear, dim3 grid) {
  blockIdx = {static_cast<unsigned>(linear % grid.x),
              static_cast<unsigned>(linear / grid.x % grid.y),
              static_cast<unsigned>(linear / grid.x / grid.y)};
  now.block.epoch = 0;
  now.block.clocks.reset(now.block.threads);
  std::memset(dynamic_shared_begin(), kPoison, now.shared_bytes);
  start_block();
  start_mbarriers();
  for (unsigned i = 0; i < now.block.threads; ++i) {
    Thread& t = *now.threads[i];
    t.number = i;
    t.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    t.copy_groups.assign(1, {});
    t.products.clear();
    t.products_issued = 0;
    t.proxy_fences.clear();
    t.fiber.start(&run_thread);
    set_ready(t);
  }
  for (unsigned live = now.block.threads; live > 0;) {
    const bool random = now.schedule.order == Schedule::Order::random;
    if (random && copies_in_flight() && next_random() % 4 == 0) end_copy(next_random());
    Thread* next = choose();
    if (!next) {
      if (copies_in_flight()) {
        end_copy(0);  // the latest moment that hardware may choose
      } else {
        report_deadlock();
        release_barrier();
      }
      continue;
    }
    now.current = next;
    threadIdx = next->index;
    next->fiber.enter();
    now.current = nullptr;
    if (next->state == State::done) --live;
  }
  check_leftovers();
}

uint64_t hash_of(const char* data, std::size_t bytes) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (std::size_t i = 0; i < bytes; ++i) {
    hash = (hash ^ static_cast<unsigned char>(data[i])) * 0x100000001b3u;  // FNV-1a
  }
  return hash;
}

}  // namespace

void set_ready(Thread& t) {
  t.state = State::ready;
  now.ready[t.number / 64] |= uint64_t{1} << (t.number % 64);
}

void wait(State state) {
  Thread& self = *now.current;
  self.state = state;
  now.ready[self.number / 64] &= ~(uint64_t{1} << (self.number % 64));
  self.fiber.leave(state == State::done);
}

Thread* thread(unsigned number) {
  return number < now.block.threads ? now.threads[number].get() : nullptr;
}

std::string site_text(Site site) {
  const std::string file = site.file;
  const std::size_t root = file.rfind("csrc/");
  return (root == std::string::npos ? file : file.substr(root)) + ":" + std::to_string(site.line);
}

std::string format(const char* form, unsigned a, unsigned b, unsigned c) {
  char buffer[256];
  std::snprintf(buffer, sizeof(buffer), form, a, b, c);
  return buffer;
}

void run(const LaunchSizes& sizes, const std::function<void()>& body) {
  const uint64_t threads = uint64_t{sizes.block.x} * sizes.block.y * sizes.block.z;
  now.kernel = demangled(Symbols::get().mangled_name(sizes.kernel));
  now.kernel.resize(now.kernel.find('(') == std::string::npos ? now.kernel.size()
                                                              : now.kernel.rfind('('));
  if (threads == 0 || threads > kMaxThreads) fail("launch", "a block has 1 to 1024 threads");
  if (sizes.grid.x > 0x7fffffffu || sizes.grid.y > kMaxGridYZ || sizes.grid.z > kMaxGridYZ) {
    fail("launch", format("grid of %u x %u x %u blocks", sizes.grid.x, sizes.grid.y, sizes.grid.z));
  }
  if (sizes.shared_bytes > kMaxDynamicShared) fail("launch", "more than 227 KiB shared memory");
  if (sizes.parameter_bytes > kMaxParameterBytes) fail("launch", "kernel arguments too large");

  now.body = &body;
  gridDim = sizes.grid;
  blockDim = sizes.block;
  now.shared_bytes = sizes.shared_bytes;
  now.block.threads = static_cast<unsigned>(threads);
  now.block.launch_first = now.block.number + 1;
  now.ready.assign((threads + 63) / 64, 0);
  while (now.threads.size() < threads) now.threads.emplace_back(new Thread);
  start_launch(sizes.kernel);

  const uint64_t blocks = uint64_t{sizes.grid.x} * sizes.grid.y * sizes.grid.z;
  std::vector<uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), uint64_t{0});
  if (now.schedule.order == Schedule::Order::reverse) std::reverse(order.begin(), order.end());
  if (now.schedule.order == Schedule::Order::random) {
    for (uint64_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
  }
  for (const uint64_t linear : order) {
    ++now.block.number;
    run_block(linear, sizes.grid);
  }
  LaunchRecord record{now.kernel, {}};
  for (const auto& a : DeviceMemory::get().allocations()) {
    record.hashes.push_back(a->kind == Kind::input ? 0 : hash_of(a->begin, a->bytes));
  }
  now.log.push_back(std::move(record));
  now.kernel.clear();
}

Thread* running() { return now.current; }
Block& block() { return now.block; }
const Schedule& schedule() { return now.schedule; }
const std::string& kernel_name() { return now.kernel; }
void* dynamic_shared() {
  if (now.shared_bytes == 0) fail("launch", "dynamic shared memory was not asked for");
  return dynamic_shared_begin();
}
char* dynamic_shared_begin() {
  const std::size_t address = reinterpret_cast<std::size_t>(now.shared.data()) + kSharedGuard;
  return reinterpret_cast<char*>((address + 127) / 128 * 128);
}
std::size_t dynamic_shared_bytes() { return now.shared_bytes; }
const std::vector<LaunchRecord>& launch_log() { return now.log; }
void clear_launch_log() { now.log.clear(); }
void set_case(const std::string& name) { now.case_name = name; }
void set_schedule(const Schedule& schedule) {
  now.schedule = schedule;
  now.random_state = schedule.seed;
}

Schedule Schedule::parse(const std::string& text) {
  Schedule s;
  s.name = text;
  if (text == "reverse") s.order = Order::reverse;
  if (text.rfind("random:", 0) == 0) {
    s.order = Order::random;
    s.seed = std::stoull(text.substr(7));
  }
  return s;
}

void fail(const char* kind, const std::string& details) {
  std::fprintf(stderr, "emulated grid: %s: %s\n", kind, details.c_str());
  if (!now.kernel.empty()) std::fprintf(stderr, "  kernel %s\n", now.kernel.c_str());
  if (now.current) {
    std::fprintf(stderr, "  block (%u, %u, %u) thread (%u, %u, %u), number %u\n", blockIdx.x,
                 blockIdx.y, blockIdx.z, now.current->index.x, now.current->index.y,
                 now.current->index.z, now.current->number);
  }
  std::fprintf(stderr, "  case %s, schedule %s\n", now.case_name.c_str(),
               now.schedule.name.c_str());
  std::fflush(stderr);
  std::_Exit(kFoundExit);
}
void fail(const char* kind, const char* details) { fail(kind, std::string(details)); }

}  // namespace emulated

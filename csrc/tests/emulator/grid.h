// The running launch: its threads, their states and who runs next.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../emulated_grid.h"
#include "clocks.h"
#include "fiber.h"

namespace emulated {

enum class State : uint8_t { ready, at_barrier, at_collective, at_mbarrier, at_warpgroup, done };

struct PendingCopy {
  char* to;
  const char* from;
  int bytes, valid_bytes;
};

// A thread's part of a group of wgmma that it has not waited for.
struct PendingProduct {
  float* sums;
  float values[64];
};

struct Mbarrier;

struct Thread {
  Fiber fiber;
  unsigned number = 0;  // linear, within the block
  uint3 index{};
  State state = State::done;
  Site site{};  // of the collective it waits at
  const char* collective = nullptr;
  unsigned mask = 0;
  void* data = nullptr;
  // Asynchronous copies in order of issue: groups that are committed, then the open one.
  std::vector<std::vector<PendingCopy>> copy_groups;
  std::vector<PendingProduct> products;  // in order of issue
  uint32_t products_issued = 0;
  std::vector<Moment> proxy_fences;
  const Mbarrier* mbarrier = nullptr;  // that it waits for
};

// The order in which ready threads, and blocks, take their turns.
struct Schedule {
  enum class Order { forward, reverse, random } order = Order::forward;
  uint64_t seed = 0;
  std::string name = "forward";
  static Schedule parse(const std::string& text);  // "forward", "reverse" or "random:<seed>"
};

struct Block {
  uint32_t number = 0;        // over all launches of the process
  uint32_t launch_first = 0;  // number of the first block of the launch
  uint32_t epoch = 0;         // barriers so far
  unsigned threads = 0;
  Clocks clocks;
};

void set_schedule(const Schedule& schedule);
void set_case(const std::string& name);

Thread* running();                // null outside of kernels
Thread* thread(unsigned number);  // of the running block; null if it has fewer threads
Block& block();
void wait(State state);           // the running thread lets others run
void set_ready(Thread& thread);
unsigned missing_lanes(const Thread& waiting);  // lanes that its warp collective lacks
const Schedule& schedule();
const std::string& kernel_name();

// Poisoned memory that kernels get through GRADSAFE_DYNAMIC_SHARED.
char* dynamic_shared_begin();
std::size_t dynamic_shared_bytes();             // that the launch asked for
constexpr std::size_t kMaxDynamicShared = 227 << 10;
constexpr std::size_t kSharedGuard = 64 << 10;  // on both sides

// One line per finished launch; equal under every schedule unless results depend on the order.
struct LaunchRecord {
  std::string kernel;
  std::vector<uint64_t> hashes;  // of every allocation
};
const std::vector<LaunchRecord>& launch_log();
void clear_launch_log();

// Prints what was found and where, and ends the process with kFoundExit.
constexpr int kFoundExit = 3;
[[noreturn]] void fail(const char* kind, const std::string& details);
std::string site_text(Site site);
std::string format(const char* form, unsigned a, unsigned b = 0, unsigned c = 0);

}  // namespace emulated

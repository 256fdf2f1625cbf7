#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if !defined(__x86_64__) || defined(EMULATED_UCONTEXT)
#define EMULATED_SWITCH 0
#include <ucontext.h>
#else
#define EMULATED_SWITCH 1
#endif

// AddressSanitizer wants to know which stack is in use. Weak: absent in builds without it.
extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** save, const void* bottom,
                                                          size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* saved, const void** bottom,
                                                           size_t* size);
}

namespace emulated {
namespace {

// Kernel arguments (up to 32 KiB, by value) and the frames of an instrumented kernel.
constexpr std::size_t kStackBytes = 512 << 10;
// No access on both sides: a stack overflow faults at once, and no local variable lies so close to
// the shared variables that it is taken for their guard zone (kSharedGuard, grid.h).
constexpr std::size_t kMarginBytes = 64 << 10;

const void* caller_stack = nullptr;
std::size_t caller_stack_bytes = 0;
void* caller_fake_stack = nullptr;

void announce_switch(void** save, const void* bottom, std::size_t bytes) {
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(save, bottom, bytes);
}
void confirm_switch(void* saved, const void** bottom, std::size_t* bytes) {
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(saved, bottom, bytes);
}

void (*starting)() = nullptr;  // handed to the first instruction of a fiber
void begin() {
  confirm_switch(nullptr, &caller_stack, &caller_stack_bytes);
  starting();
  abort();  // an entry never returns
}

}  // namespace

#if EMULATED_SWITCH

// Saves the registers that a callee must preserve on the current stack, stores the stack pointer
// through the first argument and continues on the stack of the second. swapcontext would do, but
// makes two system calls per switch, and a block switches thousands of times.
asm(R"(
.text
.type emulated_switch, @function
emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulated_switch, . - emulated_switch
)");
extern "C" void emulated_switch(void** save, void* resume) asm("emulated_switch");

struct Fiber::Context {
  void* own = nullptr;
  void* caller = nullptr;
  void (*entry)() = nullptr;

  void prepare(char* stack, std::size_t bytes) {
    uint64_t* top = reinterpret_cast<uint64_t*>(stack + bytes);
    *--top = 0;  // as after a call: the stack pointer is 8 below a multiple of 16
    *--top = reinterpret_cast<uint64_t>(&begin);
    for (int i = 0; i < 6; ++i) *--top = 0;
    own = top;
  }
  void resume() { emulated_switch(&caller, own); }
  void suspend() { emulated_switch(&own, caller); }
};

#else

struct Fiber::Context {
  ucontext_t own, caller;
  void (*entry)() = nullptr;

  void prepare(char* stack, std::size_t bytes) {
    getcontext(&own);
    own.uc_stack.ss_sp = stack;
    own.uc_stack.ss_size = bytes;
    own.uc_link = nullptr;
    makecontext(&own, &begin, 0);
  }
  void resume() { swapcontext(&caller, &own); }
  void suspend() { swapcontext(&own, &caller); }
};

#endif

Fiber::Fiber() : context_(new Context), stack_bytes_(kStackBytes) {
  void* memory = mmap(nullptr, stack_bytes_ + 2 * kMarginBytes, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  stack_ = static_cast<char*>(memory) + kMarginBytes;
  if (memory == MAP_FAILED || mprotect(stack_, stack_bytes_, PROT_READ | PROT_WRITE) != 0) {
    perror("emulated grid: stack of an emulated thread");
    exit(1);
  }
}

Fiber::~Fiber() {
  munmap(stack_ - kMarginBytes, stack_bytes_ + 2 * kMarginBytes);
  delete context_;
}

void Fiber::start(void (*entry)()) {
  context_->entry = entry;
  context_->prepare(stack_, stack_bytes_);
  fake_stack_ = nullptr;
}

void Fiber::enter() {
  starting = context_->entry;
  announce_switch(&caller_fake_stack, stack_, stack_bytes_);
  context_->resume();
  confirm_switch(caller_fake_stack, nullptr, nullptr);
}

void Fiber::leave(bool finished) {
  announce_switch(finished ? nullptr : &fake_stack_, caller_stack, caller_stack_bytes);
  context_->suspend();
  confirm_switch(fake_stack_, &caller_stack, &caller_stack_bytes);
}

}  // namespace emulated

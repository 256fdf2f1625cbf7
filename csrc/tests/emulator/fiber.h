// A fiber: a stack and the point where its code stands. One per emulated thread.
#pragma once

#include <cstddef>

namespace emulated {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Sets the fiber to the start of `entry`, which must never return.
  void start(void (*entry)());
  // Runs the fiber until it calls `leave`. To be called outside of fibers.
  void enter();
  // Back to the caller of `enter`. `finished` fibers are not entered again before a new start.
  void leave(bool finished);

 private:
  struct Context;
  Context* context_;
  char* stack_;
  std::size_t stack_bytes_;
  void* fake_stack_ = nullptr;
};

}  // namespace emulated

// Asynchronous copies from global to shared memory (cp.async, compute capability 8.0 and later).
//
// The copies that a thread has started since its last cp_async_commit() form a group; groups end in
// order. cp_async_wait<N>() returns when all but the thread's latest N groups have ended. It speaks
// for the calling thread only: other threads see the data after a following __syncthreads().
#pragma once

#include "launch.cuh"

#if defined(GRADSAFE_EMULATE)
#include "emulated_tensor_core.h"
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "cp.async needs compute capability 8.0 or later"
#endif

namespace gradsafe {

// Starts a copy of 16 bytes, of which only the first `valid_bytes` (0 to 16) are read; the others
// become zeros. Both addresses are multiples of 16. Nothing is read if valid_bytes is 0, but
// `global` should still be an address inside the tensor. Goes past L1: each byte is used once.
__device__ inline void cp_async16(void* shared, const void* global, int valid_bytes = 16) {
#if defined(GRADSAFE_EMULATE)
  emulated::cp_async(shared, global, 16, valid_bytes);
#else
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(global),
               "r"(valid_bytes)
               : "memory");
#endif
}

// Ends the current group. An empty group is allowed, and keeps the count of groups in step when
// the last iterations of a pipeline have nothing left to load.
__device__ inline void cp_async_commit() {
#if defined(GRADSAFE_EMULATE)
  emulated::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

template <int N>
__device__ inline void cp_async_wait() {
  static_assert(N >= 0, "groups that may still be in flight");
#if defined(GRADSAFE_EMULATE)
  emulated::cp_async_wait(N);
#else
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
#endif
}

}  // namespace gradsafe

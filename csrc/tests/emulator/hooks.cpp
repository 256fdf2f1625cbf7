// Kernels are compiled with -fsanitize=thread, which makes the compiler call these functions at
// every access to memory that is not provably private to a thread. The executable is linked without
// the ThreadSanitizer library: what the calls mean is decided here.
#include <cstddef>

#include "access.h"

#define CHECK(p, bytes, alignment, touch) \
  emulated::check_access(p, bytes, alignment, emulated::Touch::touch, __builtin_return_address(0))
#define HOOKS(bytes)                                                                   \
  void __tsan_read##bytes(void* p) { CHECK(p, bytes, bytes, read); }                   \
  void __tsan_write##bytes(void* p) { CHECK(p, bytes, bytes, write); }                 \
  void __tsan_unaligned_read##bytes(void* p) { CHECK(p, bytes, 1, read); }             \
  void __tsan_unaligned_write##bytes(void* p) { CHECK(p, bytes, 1, write); }

extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) { CHECK(p, bytes, 1, read); }
void __tsan_write_range(void* p, size_t bytes) { CHECK(p, bytes, 1, write); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}

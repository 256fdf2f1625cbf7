#include "memory.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "access.h"

extern "C" {
__attribute__((weak)) void __asan_poison_memory_region(const volatile void* begin, size_t bytes);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* begin, size_t bytes);
}

namespace emulated {

DeviceMemory& DeviceMemory::get() {
  static DeviceMemory only;
  return only;
}

DeviceMemory::DeviceMemory() : owner_(kArenaBytes / kGuardBytes) {
  void* memory = mmap(nullptr, kArenaBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("emulated grid: device memory");
    std::exit(1);
  }
  const std::size_t address = reinterpret_cast<std::size_t>(memory);
  arena_ = reinterpret_cast<char*>((address + kGuardBytes - 1) / kGuardBytes * kGuardBytes);
}

char* DeviceMemory::allocate(const std::string& name, Kind kind, std::size_t bytes,
                             std::size_t offset) {
  const std::size_t first = used_ + kGuardBytes;  // a guard zone lies before
  const std::size_t end = first + offset + bytes;
  const std::size_t next = (end + kGuardBytes - 1) / kGuardBytes * kGuardBytes;
  if (next + kGuardBytes > kArenaBytes) {
    std::fprintf(stderr, "emulated grid: device memory is exhausted\n");
    std::exit(1);
  }
  char* data = arena_ + first + offset;
  if (__asan_poison_memory_region) {
    __asan_poison_memory_region(arena_ + used_, next + kGuardBytes - used_);
    __asan_unpoison_memory_region(data, bytes);
  }
  allocations_.emplace_back(new Allocation{name, kind, data, bytes, nullptr});
  for (std::size_t p = first / kGuardBytes; p < next / kGuardBytes; ++p) {
    owner_[p] = static_cast<uint32_t>(allocations_.size());
  }
  if (kind != Kind::input) allocations_.back()->cells = make_cells(bytes);
  std::memset(data, kPoison, bytes);
  used_ = next;
  return data;
}

void DeviceMemory::release_all() {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(arena_, used_ + kGuardBytes);
  std::fill(owner_.begin(), owner_.begin() + used_ / kGuardBytes + 1, 0u);
  allocations_.clear();
  used_ = 0;
}

Allocation* DeviceMemory::find(const void* pointer) {
  const char* address = static_cast<const char*>(pointer);
  const std::size_t page = static_cast<std::size_t>(address - arena_) / kGuardBytes;
  if (owner_[page] != 0) return allocations_[owner_[page] - 1].get();
  Allocation* nearest = nullptr;
  std::ptrdiff_t best = 0;
  for (const auto& a : allocations_) {
    const std::ptrdiff_t distance = address < a->begin ? a->begin - address
                                                       : address - (a->begin + a->bytes);
    if (!nearest || distance < best) nearest = a.get(), best = distance;
  }
  return nearest;
}

}  // namespace emulated

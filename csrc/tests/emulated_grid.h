// What a kernel sees in place of <cuda_runtime.h> when it is compiled by g++ for the emulated grid
// (GRADSAFE_EMULATE). Kernels are compiled unmodified; csrc/tests/README.md says what is checked.
//
// Deliberately absent, so that using them does not compile: float atomics (sums would depend on
// the schedule), __activemask (its value is no guarantee) and warp intrinsics without `_sync`.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "gradsafe/types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
// Kernels are the only code of the executable with thread-local variables, so its TLS segment is
// exactly the static shared memory of all kernels; the emulator finds it, and the name and extent
// of every variable in it, in its own ELF file. (A linker section would be the obvious way, but g++
// ignores section attributes on variables of templates.)
#define __shared__ static thread_local
#undef GRADSAFE_DYNAMIC_SHARED
#define GRADSAFE_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(::emulated::dynamic_shared())
// Intrinsics check their accesses themselves, in the name of the code that called them.
#define GRADSAFE_EMULATED_ACCESS __attribute__((no_sanitize_thread, noinline))
#define GRADSAFE_EMULATED_CALLER __builtin_return_address(0)

// ---- vector types and built-in variables --------------------------------------------------------
struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ---- services of the emulator -------------------------------------------------------------------
namespace emulated {

// Where a collective is called. The builtins stand for the place of the call only if they are
// default arguments by themselves, hence two parameters.
struct Site {
  const char* file;
  int line;
};
#define GRADSAFE_EMULATED_SITE const char* file = __builtin_FILE(), int line = __builtin_LINE()

void barrier(Site site);
void warp_sync(unsigned mask, Site site);
// Waits until every lane of `mask` has called the same collective, then `exchange` runs once with
// the `data` of all lanes (null for lanes outside the mask). Implies no memory order, as in CUDA.
using Exchange = void (*)(void* const (&data)[32], unsigned mask);
void warp_collective(const char* name, unsigned mask, void* data, Exchange exchange, Site site);
void fence();
void* dynamic_shared();
// Checks one access of the running thread: bounds, alignment, initialisation, races.
enum class Use { read, write, atomic };
void check(const void* address, std::size_t bytes, std::size_t alignment, Use use,
           const void* code);
[[noreturn]] void fail(const char* kind, const char* details);

struct LaunchSizes {
  const void* kernel;
  dim3 grid, block;
  std::size_t shared_bytes, parameter_bytes;
};
void run(const LaunchSizes& sizes, const std::function<void()>& body);

// Value of lane `source`, per lane. A source that does not take part is an error.
template <class T>
T shuffle(const char* name, unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  struct Data { T value, result; int source; } data{value, value, source};
  warp_collective(name, mask, &data, [](void* const (&lanes)[32], unsigned members) {
    for (int lane = 0; lane < 32; ++lane) {
      if (!(members >> lane & 1)) continue;
      Data& to = *static_cast<Data*>(lanes[lane]);
      if (!(members >> to.source & 1)) fail("shuffle", "a lane reads from a lane not in the mask");
      to.result = static_cast<Data*>(lanes[to.source])->value;
    }
  }, site);
  return data.result;
}

unsigned ballot(const char* name, unsigned mask, bool predicate, Site site);
inline int lane() { return static_cast<int>(threadIdx.x + blockDim.x *
                                            (threadIdx.y + blockDim.y * threadIdx.z)) % 32; }

}  // namespace emulated

// ---- intrinsics ---------------------------------------------------------------------------------
inline void __syncthreads(GRADSAFE_EMULATED_SITE) { emulated::barrier({file, line}); }
inline void __syncwarp(unsigned mask = ~0u, GRADSAFE_EMULATED_SITE) {
  emulated::warp_sync(mask, {file, line});
}
inline void __threadfence() { emulated::fence(); }

template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32,
              GRADSAFE_EMULATED_SITE) {
  const int lane = emulated::lane(), first = lane / width * width;
  return emulated::shuffle("__shfl_sync", mask, v, first + (source & (width - 1)), {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32,
                  GRADSAFE_EMULATED_SITE) {
  const int lane = emulated::lane(), source = lane ^ lanes;
  const bool within = source < lane / width * width + width;
  return emulated::shuffle("__shfl_xor_sync", mask, v, within ? source : lane, {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32,
                 GRADSAFE_EMULATED_SITE) {
  const int lane = emulated::lane(), source = lane - static_cast<int>(delta);
  return emulated::shuffle("__shfl_up_sync", mask, v,
                           source >= lane / width * width ? source : lane, {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32,
                   GRADSAFE_EMULATED_SITE) {
  const int lane = emulated::lane(), source = lane + static_cast<int>(delta);
  return emulated::shuffle("__shfl_down_sync", mask, v,
                           source < lane / width * width + width ? source : lane, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, bool p, GRADSAFE_EMULATED_SITE) {
  return emulated::ballot("__ballot_sync", mask, p, {file, line});
}
inline int __any_sync(unsigned mask, bool p, GRADSAFE_EMULATED_SITE) {
  return emulated::ballot("__any_sync", mask, p, {file, line}) != 0;
}
inline int __all_sync(unsigned mask, bool p, GRADSAFE_EMULATED_SITE) {
  return emulated::ballot("__all_sync", mask, p, {file, line}) == mask;
}

#define GRADSAFE_EMULATED_LOAD(name)                                                  \
  template <class T>                                                                  \
  GRADSAFE_EMULATED_ACCESS T name(const T* p) {                                       \
    emulated::check(p, sizeof(T), sizeof(T), emulated::Use::read, GRADSAFE_EMULATED_CALLER); \
    return *p;                                                                        \
  }
#define GRADSAFE_EMULATED_STORE(name)                                                 \
  template <class T>                                                                  \
  GRADSAFE_EMULATED_ACCESS void name(T* p, T value) {                                 \
    emulated::check(p, sizeof(T), sizeof(T), emulated::Use::write, GRADSAFE_EMULATED_CALLER); \
    *p = value;                                                                       \
  }
// `x` is the value before, `v` the argument.
#define GRADSAFE_EMULATED_ATOMIC(name, after)                                         \
  template <class T>                                                                  \
  GRADSAFE_EMULATED_ACCESS T name(T* p, T v) {                                        \
    static_assert(std::is_integral<T>::value, "only integers: float sums need an order"); \
    emulated::check(p, sizeof(T), sizeof(T), emulated::Use::atomic, GRADSAFE_EMULATED_CALLER); \
    const T x = *p;                                                                   \
    *p = (after);                                                                     \
    return x;                                                                         \
  }
GRADSAFE_EMULATED_LOAD(__ldg)
GRADSAFE_EMULATED_LOAD(__ldca)
GRADSAFE_EMULATED_LOAD(__ldcg)
GRADSAFE_EMULATED_LOAD(__ldcs)
GRADSAFE_EMULATED_STORE(__stcg)
GRADSAFE_EMULATED_STORE(__stcs)
GRADSAFE_EMULATED_ATOMIC(atomicAdd, x + v)
GRADSAFE_EMULATED_ATOMIC(atomicExch, v)
GRADSAFE_EMULATED_ATOMIC(atomicOr, x | v)
GRADSAFE_EMULATED_ATOMIC(atomicMax, x > v ? x : v)
GRADSAFE_EMULATED_ATOMIC(atomicMin, x < v ? x : v)
GRADSAFE_EMULATED_ATOMIC(atomicInc, x >= v ? T{0} : x + 1)

template <class To, class From>
To emulated_bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
inline float __uint_as_float(unsigned x) { return emulated_bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return emulated_bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return emulated_bit_cast<float>(x); }
inline int __float_as_int(float x) { return emulated_bit_cast<int>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <class T> constexpr T min(T a, T b) { return b < a ? b : a; }
template <class T> constexpr T max(T a, T b) { return a < b ? b : a; }
inline float rsqrtf(float x) { return static_cast<float>(1.0 / sqrt(static_cast<double>(x))); }
inline float __expf(float x) { return expf(x); }  // the fast forms are less exact on a GPU
inline float __logf(float x) { return logf(x); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdividef(float x, float y) { return x / y; }

float emulated_half_to_float(uint16_t bits);
uint16_t emulated_float_to_half(float value);  // rounds to nearest even

// ---- launches -----------------------------------------------------------------------------------
namespace gradsafe {

// The signature of the real `launch`; runs the whole grid before it returns.
template <class... Params, class... Args>
Status launch(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes,
              void* /*stream*/, const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return {};
  std::tuple<std::remove_cv_t<Params>...> values(args...);
  const std::size_t bytes = (std::size_t{0} + ... + sizeof(Params));
  emulated::run({reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, bytes},
                [&] { std::apply(kernel, values); });
  return {};
}

}  // namespace gradsafe

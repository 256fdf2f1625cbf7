// Emulated forms of the instructions of compute capability 9.0 that csrc/cuda/common/hopper.cuh
// wraps, by the same names, and what is used there of <cuda.h>.
#pragma once

#include "emulated_grid.h"

// ---- the driver's tensor maps --------------------------------------------------------------------
using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUresult { CUDA_SUCCESS };
enum cudaError_t { cudaErrorInvalidValue = 1 };
enum CUtensorMapDataType {
  CU_TENSOR_MAP_DATA_TYPE_UINT8 = 0,
  CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6,
  CU_TENSOR_MAP_DATA_TYPE_FLOAT32 = 7,
  CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9,
};
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };
struct alignas(64) CUtensorMap {  // innermost dimension first
  const char* data;
  cuuint64_t sizes[3];
  cuuint64_t strides[2];  // bytes
  cuuint32_t box[3];
  cuuint32_t element_bytes;
  char unused[64];
};
static_assert(sizeof(CUtensorMap) == 128, "as in <cuda.h>");

namespace emulated {

// ---- mbarriers and bulk copies (emulator/mbarrier.cpp) -------------------------------------------
// A phase ends when all arrivals and all expected bytes are there. A wait lets other threads run;
// one that nobody can satisfy is reported. Arrivals release, waits acquire.
uint32_t shared_address(const void* p);
void mbarrier_init(uint32_t barrier, int arrivals);
void mbarrier_init_fence();
void mbarrier_arrive(uint32_t barrier, int expected_bytes);
void mbarrier_wait(uint32_t barrier, uint32_t parity, Site site);
// The destination is poisoned until the copy has ended: at once under the schedule `reverse`, when
// no thread can run under `forward`, at any time and in any order under `random`.
void copy_box(uint32_t to, const CUtensorMap* map, const int (&from)[3], uint32_t barrier);
void store_shared_zeros(uint32_t to);
void fence_async_proxy();
// Reports what the driver refuses.
CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                      const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                      CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// ---- products of a warpgroup (emulator/wgmma.cpp) ------------------------------------------------
// All 128 threads must take part, with equal operands. The sums are NaN until the group has been
// waited for; writing to an operand before that is reported.
struct Wgmma {
  uint64_t a, b, step;  // descriptors, and what is added to both for the next step
  int steps;
  bool add;
  float (*widen)(uint16_t bits);
};
void wgmma_m64n128k16(float* sums, const Wgmma& product, Site site);
void wgmma_wait(unsigned groups_in_flight, Site site);

}  // namespace emulated

// ---- the wrappers of hopper.cuh ------------------------------------------------------------------
#define GRADSAFE_EMULATED_INLINE __attribute__((always_inline)) inline
namespace gradsafe {

inline uint32_t shared_address(const void* p) { return emulated::shared_address(p); }
inline uint32_t pinned_shared_address(const void* p) { return emulated::shared_address(p); }

GRADSAFE_EMULATED_INLINE void mbarrier_init(uint32_t barrier, int arrivals) {
  emulated::mbarrier_init(barrier, arrivals);
}
inline void mbarrier_init_fence() { emulated::mbarrier_init_fence(); }
GRADSAFE_EMULATED_INLINE void mbarrier_expect(uint32_t barrier, int bytes) {
  emulated::mbarrier_arrive(barrier, bytes);
}
GRADSAFE_EMULATED_INLINE void mbarrier_arrive(uint32_t barrier) {
  emulated::mbarrier_arrive(barrier, 0);
}
GRADSAFE_EMULATED_INLINE void mbarrier_wait(uint32_t barrier, uint32_t parity,
                                            GRADSAFE_EMULATED_SITE) {
  emulated::mbarrier_wait(barrier, parity, {file, line});
}
GRADSAFE_EMULATED_INLINE void copy_box(uint32_t to, const CUtensorMap* map, int col, int row,
                                       int depth, uint32_t barrier) {
  emulated::copy_box(to, map, {col, row, depth}, barrier);
}
GRADSAFE_EMULATED_INLINE void store_shared_zeros(uint32_t to) { emulated::store_shared_zeros(to); }
inline void fence_async_proxy() { emulated::fence_async_proxy(); }
template <int kRegisters>
void take_registers() {}
template <int kRegisters>
void give_registers() {}

template <class T, int kSteps>
GRADSAFE_EMULATED_INLINE void wgmma_m64n128(float (&d)[64], uint64_t a, uint64_t b, int add,
                                            int bytes, GRADSAFE_EMULATED_SITE) {
  const emulated::Wgmma product{a, b, static_cast<uint64_t>(bytes >> 4), kSteps, add != 0,
                                [](uint16_t bits) { return widen(T{bits}); }};
  emulated::wgmma_m64n128k16(d, product, {file, line});
}
template <int kInFlight>
GRADSAFE_EMULATED_INLINE void wgmma_wait(GRADSAFE_EMULATED_SITE) {
  emulated::wgmma_wait(kInFlight, {file, line});
}

}  // namespace gradsafe

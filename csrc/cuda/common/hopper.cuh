// Instructions of compute capability 9.0 (sm_90a): mbarriers, bulk tensor copies, wgmma.
//
// An address in shared memory is a 32-bit number here (shared_address).
#pragma once

#include "launch.cuh"
#include "vec.cuh"

#if defined(GRADSAFE_EMULATE)
#include "emulated_hopper.h"  // what is left out below
#else
#include <cuda.h>
#endif

namespace gradsafe {

#if !defined(GRADSAFE_EMULATE)

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// The same, opaque to the compiler, which would otherwise compute it anew in every loop.
__device__ inline uint32_t pinned_shared_address(const void* p) {
  uint32_t address;
  asm volatile("mov.u32 %0, %1;" : "=r"(address) : "r"(shared_address(p)));
  return address;
}

// ---- mbarriers -------------------------------------------------------------------------------
__device__ inline void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
// Makes initialised barriers visible to the copy engine.
__device__ inline void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrives, and lets the phase wait for `bytes` of copies.
__device__ inline void mbarrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ inline void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Waits until the phase of this parity has ended.
__device__ inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// ---- bulk tensor copies ----------------------------------------------------------------------
// Copies a box to shared memory, from column `col`, row `row` and matrix `depth` on; what lies
// outside the tensor becomes zero. Ends in the current phase of `barrier`.
__device__ inline void copy_box(uint32_t to, const CUtensorMap* map, int col, int row, int depth,
                                uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(col), "r"(row), "r"(depth)
      : "memory");
}

__device__ inline void store_shared_zeros(uint32_t to) {  // 16 bytes
  asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
}

// ---- warpgroups ------------------------------------------------------------------------------
// Orders ordinary accesses to shared memory before later ones of wgmma and the copy engine.
__device__ inline void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kInFlight>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kInFlight) : "memory");
}

// d (+)= a^T b for a [16 kSteps, 64] and b [16 kSteps, 128], as a group of its own. Element
// 4 n + 2 h + e of d lies at row 16 warp + 8 h + lane / 4 and column 8 n + 2 (lane % 4) + e. Without
// `add`, d is overwritten. The rows of the next step lie `bytes` further.
#define GRADSAFE_SUMS                                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "        \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "        \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "        \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define GRADSAFE_WGMMA(type, more)                                                               \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.fence.sync.aligned;\n"           \
               "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" GRADSAFE_SUMS   \
               "}, %64, %65, p, 1, 1, 1, 1;\n" more "wgmma.commit_group.sync.aligned;\n}"        \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),         \
                 "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),       \
                 "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]),   \
                 "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),   \
                 "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),   \
                 "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),   \
                 "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),   \
                 "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),   \
                 "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]),   \
                 "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]),   \
                 "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])                              \
               : "l"(a), "l"(b), "r"(add), "l"(a + step), "l"(b + step), "l"(a + 2 * step),      \
                 "l"(b + 2 * step), "l"(a + 3 * step), "l"(b + 3 * step)                         \
               : "memory")
#define GRADSAFE_NEXT(type, a, b)                                                                \
  "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" GRADSAFE_SUMS                \
  "}, %" #a ", %" #b ", 1, 1, 1, 1, 1;\n"
#define GRADSAFE_WGMMA_STEPS(type)                                                               \
  if constexpr (kSteps == 1) GRADSAFE_WGMMA(type, "");                                           \
  if constexpr (kSteps == 2) GRADSAFE_WGMMA(type, GRADSAFE_NEXT(type, 67, 68));                  \
  if constexpr (kSteps == 3) {                                                                   \
    GRADSAFE_WGMMA(type, GRADSAFE_NEXT(type, 67, 68) GRADSAFE_NEXT(type, 69, 70));               \
  }                                                                                              \
  if constexpr (kSteps == 4) {                                                                   \
    GRADSAFE_WGMMA(type, GRADSAFE_NEXT(type, 67, 68) GRADSAFE_NEXT(type, 69, 70)                 \
                             GRADSAFE_NEXT(type, 71, 72));                                       \
  }

template <class T, int kSteps>
__device__ inline void wgmma_m64n128(float (&d)[64], uint64_t a, uint64_t b, int add, int bytes) {
  static_assert(kSteps >= 1 && kSteps <= 4, "steps of one group");
  const uint64_t step = static_cast<uint64_t>(bytes >> 4);
  if constexpr (std::is_same_v<T, bf16>) {
    GRADSAFE_WGMMA_STEPS("bf16")
  } else {
    GRADSAFE_WGMMA_STEPS("f16")
  }
}
#undef GRADSAFE_SUMS
#undef GRADSAFE_NEXT
#undef GRADSAFE_WGMMA
#undef GRADSAFE_WGMMA_STEPS

#endif  // !GRADSAFE_EMULATE

// What is computed from these is computed behind this place, and not kept in registers before.
__device__ inline void keep_in_place(int& a, int& b) { asm volatile("" : "+r"(a), "+r"(b)); }

// Operand in shared memory, stored by k in rows of 64 16-bit elements (128 bytes), 16-byte chunk c
// of row k at place c ^ (k % 8); eight rows lie together. `next_columns`: bytes to the next 64
// columns, `next_rows`: bytes to the next eight rows.
__device__ inline uint64_t wgmma_operand(uint32_t address, int next_columns, int next_rows) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | uint64_t{static_cast<uint32_t>(next_rows) >> 4} << 32 |
         uint64_t{static_cast<uint32_t>(next_columns) >> 4} << 16 | (address & 0x3ffff) >> 4;
}

// ---- host ------------------------------------------------------------------------------------
// cuTensorMapEncodeTiled of the driver, asked for through the runtime: libcuda is not linked. Null
// where the driver has none.
using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                 const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                 const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

inline EncodeTiled encode_tiled() {
#if defined(GRADSAFE_EMULATE)
  return &emulated::encode_tiled;
#else
  static const EncodeTiled function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t error = cudaGetDriverEntryPointByVersion(
        "cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess
               ? reinterpret_cast<EncodeTiled>(entry)
               : nullptr;
  }();
  return function;
#endif
}

// A map of a [depth, rows, cols] tensor for boxes of `box_rows` rows of 128 bytes, swizzled.
// Addresses and strides are multiples of 16 bytes.
inline bool encode_tensor_map(CUtensorMap& map, const void* data, DType dtype, int64_t cols,
                              int64_t rows, int64_t stride, int64_t depth, int64_t depth_stride,
                              int box_rows) {
  const int64_t bytes = size_of(dtype);
  const auto wide = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  const cuuint64_t sizes[] = {wide(cols), wide(rows), wide(depth)};
  const cuuint64_t strides[] = {wide(stride * bytes), wide(depth_stride * bytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(128 / bytes),
                            static_cast<cuuint32_t>(box_rows), 1};
  const cuuint32_t steps[] = {1, 1, 1};
  const CUtensorMapDataType type = dtype == DType::f32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                   : dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                   : dtype == DType::f16  ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                          : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  return encode_tiled()(&map, type, 3, const_cast<void*>(data), sizes, strides, box, steps,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace gradsafe

// Warp-wide matrix products (mma.sync) and the loads that bring shared memory into their layout
// (ldmatrix), for bf16 and f16 with float32 sums; compute capability 8.0 and later. All 32 lanes
// must call each of these together.
//
// Layout of a 16 x 8 x 16 product c[16, 8] += a[16, 16] b[16, 8] over the lanes, with g = lane / 4
// and t = lane % 4; a 32-bit register holds two neighbours, the one with the smaller index in its
// low half (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
//
//   a[0]: row g,      columns 2t, 2t + 1       b[0]: rows 2t, 2t + 1,      column g
//   a[1]: row g + 8,  columns 2t, 2t + 1       b[1]: rows 2t + 8, 2t + 9,  column g
//   a[2]: row g,      columns 2t + 8, 2t + 9   c[0], c[1]: row g,          columns 2t, 2t + 1
//   a[3]: row g + 8,  columns 2t + 8, 2t + 9   c[2], c[3]: row g + 8,      columns 2t, 2t + 1
#pragma once

#include <type_traits>

#include "vec.cuh"

#if defined(GRADSAFE_EMULATE)
#include "emulated_tensor_core.h"
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "mma.sync of bf16 needs compute capability 8.0 or later"
#endif

namespace gradsafe {

// c += a b, with a and b of type T (bf16 or f16) in the layout above.
template <class T>
__device__ inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same<T, bf16>::value || std::is_same<T, f16>::value, "bf16 or f16");
#if defined(GRADSAFE_EMULATE)
  emulated::mma_m16n8k16(c, a, b, [](uint16_t bits) { return widen(T{bits}); });
#else
  if constexpr (std::is_same<T, bf16>::value) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// Loads N = 1, 2 or 4 matrices of 8 x 8 16-bit elements from shared memory. Lane 8 m + i passes the
// address (a multiple of 16) of row i of matrix m; what lanes from 8 N on pass is ignored. Lane l
// receives in r[m] the elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of matrix m.
//
// For `a` above, stored by rows: matrix m is the 8 x 8 part at row 8 (m % 2), column 8 (m / 2).
template <int N>
__device__ inline void ldmatrix(uint32_t (&r)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4, "one, two or four matrices");
#if defined(GRADSAFE_EMULATE)
  emulated::ldmatrix(r, N, false, row);
#else
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (N == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];\n"
                 : "=r"(r[0]) : "r"(from) : "memory");
  } else if constexpr (N == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(from) : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
  }
#endif
}

// As ldmatrix, but each matrix arrives transposed: lane l receives the elements of column l / 4 in
// rows 2 (l % 4) and 2 (l % 4) + 1.
//
// For `b` above, stored by rows of k: matrix m is the 8 x 8 part at row 8 m. Also for `a` stored
// transposed, as x and dy are in dy^T x: matrix m at stored row 8 (m / 2), stored column 8 (m % 2).
template <int N>
__device__ inline void ldmatrix_trans(uint32_t (&r)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4, "one, two or four matrices");
#if defined(GRADSAFE_EMULATE)
  emulated::ldmatrix(r, N, true, row);
#else
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (N == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];\n"
                 : "=r"(r[0]) : "r"(from) : "memory");
  } else if constexpr (N == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(from) : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
  }
#endif
}

// c[16, 8] += a[16, 8] b[8, 8] for float32 operands of which the tensor core reads the upper 19 bits
// (TF32: the lower 13 bits are ignored). With g and t as above:
//
//   a[0]: row g,     column t        a[2]: row g,     column t + 4       b[0]: row t,     column g
//   a[1]: row g + 8, column t        a[3]: row g + 8, column t + 4       b[1]: row t + 4, column g
//
// The layout of c is that above. For operands stored by rows of k (b transposed), ldmatrix moves
// 8 x 4 parts of float32 as it moves 8 x 8 parts of 16 bits.
__device__ inline void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
#if defined(GRADSAFE_EMULATE)
  emulated::mma_m16n8k8_tf32(c, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

}  // namespace gradsafe

// Emulated forms of the warp-wide matrix instructions and of asynchronous copies. Kernels use the
// wrappers of csrc/cuda/common/mma.cuh and async_copy.cuh, which call these under GRADSAFE_EMULATE.
#pragma once

#include "emulated_grid.h"

namespace emulated {

using Widen = float (*)(uint16_t bits);

// mma.sync m16n8k16, fp32 accumulate, fragments as in PTX. Products are exact and each result is
// rounded once, so it is slightly more exact than a tensor core.
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Widen widen);

// mma.sync m16n8k8 of TF32: the lower 13 bits of a and b are ignored. Each result is truncated to
// float32, as tensor cores do, so that bounds of tests hold there, too.
void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// ldmatrix .x1, .x2, .x4 (count = 1, 2, 4), .trans if transposed.
void ldmatrix(uint32_t* registers, int count, bool transposed, const void* row);

// The destination is poisoned until the copy's group has been waited for; reading it earlier is
// reported. The copy itself happens in the wait, the latest moment that hardware may choose.
void cp_async(void* shared, const void* global, int bytes, int valid_bytes);
void cp_async_commit();
void cp_async_wait(int groups_in_flight);

}  // namespace emulated

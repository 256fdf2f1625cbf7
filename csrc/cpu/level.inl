// One instruction set's copy of every kernel. The anonymous namespace keeps each copy private: a
// shared inline function would let the linker hand AVX-512 code to a machine without it.
#include "kernels.h"

namespace gradsafe {
namespace {
#include "moments_impl.inl"
#include "wgrad_moments_impl.inl"
#include "exp_impl.inl"
#include "kl_divergence_impl.inl"
}  // namespace

const CpuKernels& GRADSAFE_KERNELS() {
  static constexpr CpuKernels table{&moments_tile, &wgrad_panel, &pack,
                                    &is_idle_token, &kl_sums, &kl_gradient};
  return table;
}

}  // namespace gradsafe

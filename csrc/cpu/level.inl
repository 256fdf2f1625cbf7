// One instruction set's copy of every kernel. The anonymous namespace keeps each copy private: a
// shared inline function would let the linker hand AVX-512 code to a machine without it.
#include <type_traits>

#include "kernels.h"

namespace gradsafe {
namespace {
#include "moments_impl.inl"
#include "surgery_impl.inl"
#include "surgery_adamw_impl.inl"
#include "subspace_surgery_impl.inl"
#include "wgrad_moments_impl.inl"
#include "cosine_topk_impl.inl"
#include "exp_impl.inl"
#include "kl_divergence_impl.inl"
#if defined(GRADSAFE_PAIRS)
#include GRADSAFE_PAIRS
constexpr PanelKernels kPairs{&pack_pairs, &pair_panel};
#else
constexpr PanelKernels kPairs{};
#endif
#if defined(GRADSAFE_COSINE_PAIRS)
#include GRADSAFE_COSINE_PAIRS
constexpr CosinePairKernels kCosinePairs{&pack_cosine_pairs, &cosine_pair_panel};
#else
constexpr CosinePairKernels kCosinePairs{};
#endif
#if defined(GRADSAFE_COSINE_ROWS)
#include GRADSAFE_COSINE_ROWS
constexpr auto kCosineRowsKernel = &cosine_rows;
#else
constexpr decltype(CpuKernels::cosine_rows) kCosineRowsKernel = nullptr;
#endif
}  // namespace

const CpuKernels& GRADSAFE_KERNELS() {
  static constexpr CpuKernels table{
      &moments_tile,
      &factors_tile,
      {&pack, &wgrad_panel},
      kPairs,
      &is_idle_token,
      &smallest_exponent,
      &largest_magnitude,
      &pack_scaled,
      &cosine_panel,
      kCosinePairs,
      kCosineRowsKernel,
      &surgery_sums,
      &surgery_merge,
      &surgery_adamw,
      &subspace_sums,
      &subspace_merge,
      &kl_sums,
      &kl_gradient,
  };
  return table;
}

}  // namespace gradsafe

#include "isa.h"
#include "kernels.h"

namespace gradsafe {

const CpuKernels& kernels() {
  switch (current_isa()) {
#if defined(GRADSAFE_X86_KERNELS)
    case Isa::avx512: return kernels_avx512();
    case Isa::avx2: return kernels_avx2();
#endif
    default: return kernels_scalar();
  }
}

}  // namespace gradsafe

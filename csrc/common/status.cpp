#include "gradsafe/status.h"

namespace gradsafe {

#if GRADSAFE_CUDA_BUILT
const char* cuda_error_text(int code);  // csrc/cuda/common/launch.cu
#else
static const char* cuda_error_text(int) { return "this build has no CUDA code"; }
#endif

std::string status_text(int code, int cuda) {
  switch (static_cast<StatusCode>(code)) {
    case StatusCode::ok: return "ok";
    case StatusCode::cuda_error:
      return "CUDA error " + std::to_string(cuda) + ": " + cuda_error_text(cuda);
    case StatusCode::no_device_code:
      return "the build holds no code for this GPU; rebuild with GRADSAFE_CUDA_ARCHS set to its "
             "compute capability";
  }
  return "unknown status " + std::to_string(code);
}

}  // namespace gradsafe

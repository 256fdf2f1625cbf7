#include "gradsafe/status.h"

#include "gradsafe/launch_log.h"

namespace gradsafe {

#if GRADSAFE_CUDA_BUILT
const char* cuda_error_text(int code);  // csrc/cuda/common/launch.cu
#else
static const char* cuda_error_text(int) { return "this build has no CUDA code"; }
void set_launch_log(bool) {}
std::vector<std::string> take_launch_log() { return {}; }
CudaVersions cuda_versions() { return {}; }
#endif

std::string status_text(int code, int cuda) {
  switch (static_cast<StatusCode>(code)) {
    case StatusCode::ok: return "ok";
    case StatusCode::cuda_error:
      return "CUDA error " + std::to_string(cuda) + ": " + cuda_error_text(cuda);
    case StatusCode::no_device_code:
      return "the build holds no code for this GPU; rebuild with GRADSAFE_CUDA_ARCHS set to its "
             "compute capability, 8.0 or later (older GPUs cannot run these kernels: move the "
             "tensors to the CPU). `gradsafe doctor` shows what the build holds";
    case StatusCode::old_driver:
      return "the GPU driver is older than the CUDA runtime of this build; update the driver, or "
             "rebuild with the nvcc of a CUDA version that the driver supports. `gradsafe doctor` "
             "shows both versions";
    case StatusCode::little_shared_memory:
      return "a kernel needs " + std::to_string(cuda) + " bytes of shared memory per block, more "
             "than this GPU grants; move the tensors to the CPU or to a GPU of compute capability "
             "8.0, 9.0 or 10.0";
  }
  return "unknown status " + std::to_string(code);
}

}  // namespace gradsafe

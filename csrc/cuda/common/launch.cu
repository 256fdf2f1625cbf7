#include "launch.cuh"

namespace gradsafe {

const char* cuda_error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace gradsafe

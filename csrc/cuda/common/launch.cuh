// The one way a kernel is launched. Keeping `<<<>>>` out of the code lets the same sources compile
// with g++ for the emulated grid of csrc/tests (GRADSAFE_EMULATE).
#pragma once

#include "gradsafe/types.h"

#if defined(GRADSAFE_EMULATE)
#include "emulated_grid.h"
#else

#include <cuda_runtime.h>

#include <tuple>
#include <utility>

namespace gradsafe {
namespace detail {

template <class Tuple, std::size_t... I>
cudaError_t launch_packed(const void* kernel, dim3 grid, dim3 block, std::size_t shared_bytes,
                          cudaStream_t stream, Tuple& values, std::index_sequence<I...>) {
  void* pointers[] = {static_cast<void*>(&std::get<I>(values))...};
  return cudaLaunchKernel(kernel, grid, block, pointers, shared_bytes, stream);
}

}  // namespace detail

// Launches `kernel` on `stream` (a cudaStream_t). An empty grid is no launch.
template <class... Params, class... Args>
Status launch(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes,
              void* stream, const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return {};
  std::tuple<std::remove_cv_t<Params>...> values(args...);
  const cudaError_t error = detail::launch_packed(
      reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
      static_cast<cudaStream_t>(stream), values, std::index_sequence_for<Params...>{});
  if (error == cudaSuccess) return {};
  (void)cudaGetLastError();  // the error is reported here; do not leave it for the next caller
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    return {StatusCode::no_device_code, static_cast<int32_t>(error)};
  }
  return {StatusCode::cuda_error, static_cast<int32_t>(error)};
}

}  // namespace gradsafe

#endif  // GRADSAFE_EMULATE

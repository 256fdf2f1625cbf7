// The one way a kernel is launched. Keeping `<<<>>>` out of the code lets the same sources compile
// with g++ for the emulated grid of csrc/tests (GRADSAFE_EMULATE).
#pragma once

#include "gradsafe/types.h"

#if defined(GRADSAFE_EMULATE)
#include "emulated_grid.h"
#else

#include <cuda_runtime.h>

#include <atomic>
#include <tuple>
#include <utility>

// Dynamic shared memory of a kernel, as an array of `type` called `name`.
#define GRADSAFE_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char gradsafe_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(gradsafe_dynamic_shared)

namespace gradsafe {
namespace detail {

constexpr std::size_t kSharedWithoutAsking = 48 * 1024;

inline Status to_status(cudaError_t error) {
  if (error == cudaSuccess) return {};
  (void)cudaGetLastError();  // the error is reported here; do not leave it for the next caller
  if (error == cudaErrorInsufficientDriver) {
    return {StatusCode::old_driver, static_cast<int32_t>(error)};
  }
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    return {StatusCode::no_device_code, static_cast<int32_t>(error)};
  }
  return {StatusCode::cuda_error, static_cast<int32_t>(error)};
}

// launch.cu: the log of gradsafe/launch_log.h.
extern std::atomic<bool> launch_log_on;
void log_launch(const void* kernel);

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
  const void* code = reinterpret_cast<const void*>(kernel);
  if (detail::launch_log_on.load(std::memory_order_relaxed)) detail::log_launch(code);
  if (shared_bytes > detail::kSharedWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(
        code, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error == cudaErrorInvalidValue) {
      (void)cudaGetLastError();
      return {StatusCode::little_shared_memory, static_cast<int32_t>(shared_bytes)};
    }
    if (error != cudaSuccess) return detail::to_status(error);
  }
  std::tuple<std::remove_cv_t<Params>...> values(args...);
  return detail::to_status(detail::launch_packed(code, grid, block, shared_bytes,
                                                 static_cast<cudaStream_t>(stream), values,
                                                 std::index_sequence_for<Params...>{}));
}

}  // namespace gradsafe

#endif  // GRADSAFE_EMULATE

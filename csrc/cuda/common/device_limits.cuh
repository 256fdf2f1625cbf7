// What the current device offers a launch. Cheap, and allowed while a graph is captured.
#pragma once

#include "launch.cuh"

namespace gradsafe {

struct DeviceLimits {
  int32_t processors = 0;      // SMs
  int64_t shared_bytes = 0;    // of one block, on request
};

#if defined(GRADSAFE_EMULATE)

inline Status device_limits(DeviceLimits& limits) {
  limits.processors = 2;  // few blocks, which then take several rows in turn
  limits.shared_bytes = 227 * 1024;
  return {};
}

#else

inline Status device_limits(DeviceLimits& limits) {
  int device = 0, processors = 0, shared = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) return detail::to_status(error);
  limits.processors = processors;
  limits.shared_bytes = shared;
  return {};
}

#endif

}  // namespace gradsafe

// What a launcher asks of the current device.
#pragma once

#include "launch.cuh"

#if defined(GRADSAFE_EMULATE)
#include <cstdlib>
#endif

namespace gradsafe {

struct DeviceLimits {
  int major = 0, minor = 0;  // compute capability
  int multiprocessors = 0;
  int shared_bytes = 0;  // of a block, dynamic and static together
};

// No result depends on these limits, but for which of two kernels with the same sums runs.
inline Status device_limits(DeviceLimits& limits) {
#if defined(GRADSAFE_EMULATE)
  // Tests choose the shared memory, to run what small devices run.
  const char* kilobytes = std::getenv("GRADSAFE_EMULATED_SHARED_KB");
  limits = {8, 0, 132, (kilobytes != nullptr ? std::atoi(kilobytes) : 227) * 1024};
  return {};
#else
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto ask = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
  };
  ask(limits.major, cudaDevAttrComputeCapabilityMajor);
  ask(limits.minor, cudaDevAttrComputeCapabilityMinor);
  ask(limits.multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return detail::to_status(error);
#endif
}

}  // namespace gradsafe

// What a launcher asks of the current device. Cheap, and allowed while a graph is captured.
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

#if defined(GRADSAFE_EMULATE)

inline int emulated_number(const char* variable, int otherwise) {
  const char* text = std::getenv(variable);
  return text != nullptr ? std::atoi(text) : otherwise;
}

// Tests choose the device. It has few multiprocessors: persistent blocks take several units of work.
inline Status device_limits(DeviceLimits& limits) {
  const int capability = emulated_number("GRADSAFE_EMULATED_CAPABILITY", 80);
  limits = {capability / 10, capability % 10, emulated_number("GRADSAFE_EMULATED_SMS", 2),
            emulated_number("GRADSAFE_EMULATED_SHARED_KB", 227) * 1024};
  return {};
}

#else

inline Status device_limits(DeviceLimits& limits) {
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
}

#endif

}  // namespace gradsafe

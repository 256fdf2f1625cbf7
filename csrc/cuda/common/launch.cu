#include "launch.cuh"

#include <cxxabi.h>

#include <cstdlib>
#include <memory>
#include <mutex>
#include <utility>

#include "gradsafe/launch_log.h"

namespace gradsafe {

const char* cuda_error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

CudaVersions cuda_versions() {
  CudaVersions versions;
  if (cudaDriverGetVersion(&versions.driver) != cudaSuccess) versions.driver = 0;
  if (cudaRuntimeGetVersion(&versions.runtime) != cudaSuccess) versions.runtime = 0;
  return versions;
}

namespace {

std::mutex log_mutex;
std::vector<std::string> log_names;

std::string readable(const char* mangled) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> text(
      abi::__cxa_demangle(mangled, nullptr, nullptr, &status), &std::free);
  return status == 0 ? text.get() : mangled;
}

}  // namespace

namespace detail {

std::atomic<bool> launch_log_on{false};

void log_launch(const void* kernel) {
  const char* name = nullptr;
#if CUDART_VERSION >= 12030
  if (cudaFuncGetName(&name, kernel) != cudaSuccess) (void)cudaGetLastError();
#endif
  const std::lock_guard<std::mutex> lock(log_mutex);
  log_names.push_back(name != nullptr ? readable(name) : "unknown");
}

}  // namespace detail

void set_launch_log(bool on) {
  const std::lock_guard<std::mutex> lock(log_mutex);
  log_names.clear();
  detail::launch_log_on = on;
}

std::vector<std::string> take_launch_log() {
  const std::lock_guard<std::mutex> lock(log_mutex);
  return std::exchange(log_names, {});
}

}  // namespace gradsafe

// What every CUDA operator needs around its launcher.
#pragma once

#include "checks.h"
#include "cuda_stream.h"
#include "gradsafe/status.h"

namespace gradsafe {

inline void* current_stream(int32_t device) {
  const CudaStreamShim shim = cuda_stream_shim();
  GRADSAFE_CHECK(shim != nullptr, "cuda", ": this PyTorch has no CUDA support");
  void* stream = nullptr;
  GRADSAFE_CHECK(shim(device, &stream) == 0, "cuda",
                 ": PyTorch returned no current stream for device ", device);
  return stream;
}

inline void check_status(Status status, const char* op) {
  GRADSAFE_CHECK(status.ok(), op, ": ",
                 status_text(static_cast<int>(status.code), status.cuda));
}

}  // namespace gradsafe

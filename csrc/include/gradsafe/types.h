// Plain vocabulary shared by kernels, launchers and operators. No torch, pybind or CUDA header may
// be reachable from here: every layer, and the C++ tests, include this file.
#pragma once

#include <cstdint>

namespace gradsafe {

// Element types. f8 is e4m3 without infinities (torch.float8_e4m3fn), for references only. The values
// are part of no file format.
enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, f8 = 3 };

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::f32 ? 4 : dtype == DType::f8 ? 1 : 2;
}

// Which entries of a [rows, cols] matrix share one result.
enum class Axis : int32_t {
  tensor = 0,  // all of them
  row = 1,     // one result per row: the reduction runs over the columns
  column = 2,  // one result per column
  both = 3,    // rows and columns in one read
};

constexpr bool has_rows(Axis axis) { return axis == Axis::row || axis == Axis::both; }
constexpr bool has_columns(Axis axis) { return axis == Axis::column || axis == Axis::both; }

// References per gradient that one call can score against.
constexpr int kMaxRefs = 4;

// Outcome of a launcher. CUDA launchers return `cuda_error` and keep the runtime's own code.
enum class StatusCode : int32_t {
  ok = 0,
  cuda_error = 1,
  no_device_code = 2,
  old_driver = 3,
  little_shared_memory = 4,
};

struct Status {
  StatusCode code = StatusCode::ok;
  // cudaError_t of StatusCode::cuda_error; for little_shared_memory, the bytes that were asked for.
  int32_t cuda = 0;
  constexpr bool ok() const { return code == StatusCode::ok; }
};

}  // namespace gradsafe

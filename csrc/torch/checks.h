// Checks and conversions between stable tensors and the plain structs of the kernels.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <ostream>
#include <string>
#include <vector>

#include "gradsafe/types.h"

namespace gradsafe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define GRADSAFE_CHECK(condition, ...) STD_TORCH_CHECK(condition, "gradsafe.", __VA_ARGS__)

inline std::string list_text(const std::vector<int64_t>& list) {
  std::string text = "[";
  for (size_t i = 0; i < list.size(); ++i) text += (i ? ", " : "") + std::to_string(list[i]);
  return text + "]";
}

inline std::vector<int64_t> shape_of(const Tensor& tensor) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < tensor.dim(); ++d) shape.push_back(tensor.size(d));
  return shape;
}

inline std::string shape_text(const Tensor& tensor) { return list_text(shape_of(tensor)); }

// An argument, or an item of a list of them. It becomes text only for a message: a call may have
// thousands of items.
class Name {
 public:
  Name(const char* argument, int64_t index = -1, int64_t inner = -1)  // -1: none
      : argument_(argument), index_(index), inner_(inner) {}

  friend std::ostream& operator<<(std::ostream& out, const Name& name) {
    out << name.argument_;
    if (name.index_ >= 0) out << '[' << name.index_ << ']';
    if (name.inner_ >= 0) out << '[' << name.inner_ << ']';
    return out;
  }

 private:
  const char* argument_;
  int64_t index_, inner_;
};

inline Name item(const char* argument, size_t index) {
  return {argument, static_cast<int64_t>(index)};
}

inline DType dtype_of(const Tensor& tensor, const char* op, const Name& name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: break;
  }
  GRADSAFE_CHECK(false, op, ": expected ", name, " of dtype float32, bfloat16 or float16");
  return DType::f32;
}

// References may be float8 as well.
inline DType ref_dtype_of(const Tensor& tensor, const char* op, const Name& name) {
  if (tensor.scalar_type() == ScalarType::Float8_e4m3fn) return DType::f8;
  return dtype_of(tensor, op, name);
}

// Stride between the rows of a matrix, or of each matrix of a stack, whose rows are unbroken.
inline int64_t row_stride(const Tensor& matrix, const char* op, const Name& name) {
  const int64_t last = matrix.dim() - 1, rows = matrix.size(last - 1), cols = matrix.size(last);
  GRADSAFE_CHECK(cols <= 1 || matrix.stride(last) == 1, op, ": expected ", name,
                 " with unit stride along its last dimension; call .contiguous() first");
  return rows <= 1 ? cols : matrix.stride(last - 1);
}

inline void check_same_device(const Tensor& tensor, const Tensor& first, const char* op,
                              const Name& name) {
  GRADSAFE_CHECK(tensor.is_cuda() == first.is_cuda() &&
                     tensor.get_device_index() == first.get_device_index(),
                 op, ": expected ", name, " on the device of the first tensor");
}

}  // namespace gradsafe

// The argument side of surgery with a subspace, shared by its CPU and CUDA operators.
#pragma once

#include <vector>

#include "gradsafe/subspace_surgery.h"
#include "surgery.h"

namespace gradsafe {

inline std::vector<SubspaceTask> parse_subspace(const std::vector<Tensor>& user,
                                                const std::vector<Tensor>& basis,
                                                const Tensor& direction) {
  constexpr const char* op = "subspace_surgery_";
  GRADSAFE_CHECK(!user.empty(), op, ": expected at least one tensor");
  GRADSAFE_CHECK(basis.size() == user.size(), op, ": expected ", user.size(),
                 " tensors in basis, got ", basis.size());
  GRADSAFE_CHECK(direction.dim() == 1 && direction.is_contiguous() &&
                     direction.scalar_type() == ScalarType::Double,
                 op, ": expected direction of shape [k], contiguous and float64, got shape ",
                 shape_text(direction));
  const int64_t rank = direction.size(0);
  GRADSAFE_CHECK(rank >= 1 && rank <= kMaxRank, op, ": expected 1 to ", kMaxRank,
                 " vectors, got ", rank);
  check_same_device(direction, user[0], op, "direction");
  std::vector<SubspaceTask> tasks;
  tasks.reserve(user.size());
  Extents extents;
  for (size_t i = 0; i < user.size(); ++i) {
    const Name name = item("user", i), basis_name = item("basis", i);
    std::vector<int64_t> shape = shape_of(user[i]);
    shape.insert(shape.begin(), rank);
    SubspaceTask task{};
    task.dtype = dtype_of(user[i], op, name);
    task.count = user[i].numel();
    GRADSAFE_CHECK(user[i].is_contiguous(), op, ": expected ", name,
                   " to be contiguous; call .contiguous() first");
    GRADSAFE_CHECK(shape_of(basis[i]) == shape && basis[i].is_contiguous(), op, ": expected ",
                   basis_name, " of shape ", list_text(shape), ", contiguous, got shape ",
                   shape_text(basis[i]));
    GRADSAFE_CHECK(basis[i].scalar_type() == user[i].scalar_type(), op, ": expected ", basis_name,
                   " of the dtype of ", name);
    check_same_device(user[i], user[0], op, name);
    check_same_device(basis[i], user[0], op, basis_name);
    task.user = user[i].mutable_data_ptr();
    task.basis = basis[i].const_data_ptr();
    const int64_t bytes = task.count * size_of(task.dtype);
    extents.add(task.user, bytes, true, name);
    extents.add(task.basis, rank * bytes, false, basis_name);
    tasks.push_back(task);
  }
  extents.add(direction.const_data_ptr(), rank * 8, false, "direction");
  extents.check(op);
  return tasks;
}

}  // namespace gradsafe

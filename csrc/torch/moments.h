// The argument side of gradsafe::moments, shared by its CPU and CUDA operators.
#pragma once

#include <vector>

#include "checks.h"
#include "gradsafe/moments.h"

namespace gradsafe {

struct MomentsCall {
  MomentsProblem problem{};
  std::vector<MomentsTask> tasks;
  std::vector<int64_t> out_offsets;  // in float64 elements; one more entry than tasks
};

inline MomentsCall parse_moments(const std::vector<Tensor>& grads, const std::vector<Tensor>& refs,
                                 int64_t num_refs, int64_t axis, bool unsigned_dots) {
  constexpr const char* op = "moments";
  GRADSAFE_CHECK(num_refs >= 0 && num_refs <= kMaxRefs, op, ": expected 0 to ", kMaxRefs,
                 " references per gradient, got ", num_refs);
  GRADSAFE_CHECK(axis >= 0 && axis <= 3, op, ": unknown axis code ", axis);
  GRADSAFE_CHECK(refs.size() == grads.size() * static_cast<size_t>(num_refs), op,
                 ": expected num_refs references for each of ", grads.size(), " gradients, got ",
                 refs.size());
  MomentsCall call;
  call.problem.axis = static_cast<Axis>(axis);
  call.problem.num_refs = static_cast<int32_t>(num_refs);
  call.problem.unsigned_dots = unsigned_dots;
  call.out_offsets.push_back(0);
  for (size_t i = 0; i < grads.size(); ++i) {
    const Tensor& grad = grads[i];
    const Name name = item("grads", i);
    GRADSAFE_CHECK(grad.dim() == 2, op, ": expected ", name, " of shape [O, I], got ",
                   shape_text(grad));
    check_same_device(grad, grads[0], op, name);
    const DType dtype = dtype_of(grad, op, name);
    if (i == 0) call.problem.grad_dtype = dtype;
    GRADSAFE_CHECK(dtype == call.problem.grad_dtype, op, ": expected ", name,
                   " of the dtype of grads[0]");
    MomentsTask task{};
    task.grad = grad.const_data_ptr();
    task.rows = grad.size(0);
    task.cols = grad.size(1);
    task.grad_stride = row_stride(grad, op, name);
    for (int64_t k = 0; k < num_refs; ++k) {
      const Tensor& ref = refs[i * num_refs + k];
      const Name ref_name("refs", static_cast<int64_t>(i), k);
      GRADSAFE_CHECK(ref.dim() == 2 && ref.size(0) == task.rows && ref.size(1) == task.cols, op,
                     ": expected ", ref_name, " of shape ", shape_text(grad), ", got ",
                     shape_text(ref));
      check_same_device(ref, grad, op, ref_name);
      const DType ref_dtype = ref_dtype_of(ref, op, ref_name);
      if (i == 0 && k == 0) call.problem.ref_dtype = ref_dtype;
      GRADSAFE_CHECK(ref_dtype == call.problem.ref_dtype, op, ": expected ", ref_name,
                     " of the dtype of refs[0][0]");
      task.refs[k] = ref.const_data_ptr();
      task.ref_strides[k] = row_stride(ref, op, ref_name);
    }
    call.tasks.push_back(task);
    call.out_offsets.push_back(call.out_offsets.back() +
                               moments_out_size(call.problem.axis, call.problem.num_refs,
                                                task.rows, task.cols));
  }
  // Without references their dtype is idle; one value keeps kernel instantiations few.
  if (num_refs == 0) call.problem.ref_dtype = call.problem.grad_dtype;
  return call;
}

}  // namespace gradsafe

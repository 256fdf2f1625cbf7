// The argument side of gradsafe::kl_divergence and kl_divergence_, for CPU and CUDA.
#pragma once

#include "checks.h"
#include "gradsafe/kl_divergence.h"

namespace gradsafe {

inline KlProblem parse_kl(const char* op, const Tensor& student, const Tensor& teacher) {
  GRADSAFE_CHECK(student.dim() == 2, op, ": expected student_logits of shape [N, V], got ",
                 shape_text(student));
  GRADSAFE_CHECK(student.size(1) > 0, op, ": expected a vocabulary V of at least 1, got 0");
  GRADSAFE_CHECK(teacher.dim() == 2 && teacher.size(0) == student.size(0) &&
                     teacher.size(1) == student.size(1),
                 op, ": expected teacher_logits of shape ", shape_text(student), ", got ",
                 shape_text(teacher));
  check_same_device(teacher, student, op, "teacher_logits");
  KlProblem p{};
  p.student_dtype = dtype_of(student, op, "student_logits");
  p.teacher_dtype = dtype_of(teacher, op, "teacher_logits");
  p.rows = student.size(0);
  p.vocabulary = student.size(1);
  p.student = student.const_data_ptr();
  p.teacher = teacher.const_data_ptr();
  p.student_stride = row_stride(student, op, "student_logits");
  p.teacher_stride = row_stride(teacher, op, "teacher_logits");
  return p;
}

inline KlProblem parse_kl_in_place(Tensor& student, const Tensor& teacher, const Tensor& weight) {
  constexpr const char* op = "kl_divergence_";
  KlProblem p = parse_kl(op, student, teacher);
  GRADSAFE_CHECK(p.rows <= 1 || p.student_stride >= p.vocabulary, op,
                 ": expected student_logits whose rows do not overlap; call .contiguous() first");
  GRADSAFE_CHECK(weight.dim() == 1 && weight.size(0) == p.rows, op,
                 ": expected weight of shape [", p.rows, "], got ", shape_text(weight));
  GRADSAFE_CHECK(weight.scalar_type() == ScalarType::Float, op,
                 ": expected weight of dtype float32");
  GRADSAFE_CHECK(p.rows <= 1 || weight.stride(0) == 1, op,
                 ": expected weight to be contiguous; call .contiguous() first");
  check_same_device(weight, student, op, "weight");
  p.weight = static_cast<const float*>(weight.const_data_ptr());
  p.gradient = student.mutable_data_ptr();
  return p;
}

}  // namespace gradsafe

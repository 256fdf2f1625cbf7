// Entry "kl_divergence". Integers: dtype of the student, dtype of the teacher, rows, vocabulary, row
// strides of the student and the teacher, whether the gradient is wanted. Buffers: student, teacher,
// weights (with the gradient only). Outputs: the student's buffer if the gradient was wanted, then
// float32 divergences.
#include "gradsafe/kl_divergence.h"

#include "cases.h"

namespace emulated {
namespace {

gradsafe::Status run_kl_divergence(Case& c) {
  gradsafe::KlProblem p{};
  p.student_dtype = static_cast<gradsafe::DType>(c.integer());
  p.teacher_dtype = static_cast<gradsafe::DType>(c.integer());
  p.rows = c.integer();
  p.vocabulary = c.integer();
  p.student_stride = c.integer();
  p.teacher_stride = c.integer();
  if (c.integer() != 0) {
    p.gradient = c.inout();
    p.student = p.gradient;
    p.teacher = c.input();
    p.weight = static_cast<const float*>(c.input());
  } else {
    p.student = c.input();
    p.teacher = c.input();
  }
  p.out = static_cast<float*>(c.output(p.rows * 4));
  return gradsafe::kl_divergence_cuda(p, nullptr);
}

const Entry entry("kl_divergence", &run_kl_divergence);

}  // namespace
}  // namespace emulated

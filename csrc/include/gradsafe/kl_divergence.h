// Kullback-Leibler divergence of each row's two distributions, and its gradient in place.
//
// Row n holds the logits of a student and of a teacher over one vocabulary. With p = softmax:
//   out[n] = sum_i p_teacher[i] (log p_teacher[i] - log p_student[i])        (natural logarithm)
//   gradient of weight[n] * out[n] = weight[n] (p_student - p_teacher)
#pragma once

#include "gradsafe/types.h"

namespace gradsafe {

// Element (n, i) of a matrix lies at data[n * stride + i].
struct KlProblem {
  DType student_dtype, teacher_dtype;
  int64_t rows, vocabulary;  // vocabulary >= 1
  const void* student;
  const void* teacher;
  int64_t student_stride, teacher_stride;
  float* out;           // [rows]
  void* gradient;       // the student's buffer, or null: values only
  const float* weight;  // [rows]; null if gradient is
};

// ---- CPU -------------------------------------------------------------------------------------
// Rows [begin, end) on the calling thread. A row's result depends on that row only.
void kl_divergence_cpu(const KlProblem& problem, int64_t begin, int64_t end);

// ---- CUDA ------------------------------------------------------------------------------------
// All pointers are of the device of `stream` (a cudaStream_t); there is no workspace.
Status kl_divergence_cuda(const KlProblem& problem, void* stream);

}  // namespace gradsafe

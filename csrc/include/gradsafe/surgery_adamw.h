// Gradient surgery and the AdamW step in one pass: the merged gradient is never written.
//   g = user + coefficient align                          (surgery.h)
//   p <- p - lr weight_decay p                            AdamW, arXiv 1711.05101, Algorithm 2
//   m <- m + (1 - beta1) (g - m),  v <- beta2 v + (1 - beta2) g^2
//   p <- p - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)
#pragma once

#include "gradsafe/surgery.h"

namespace gradsafe {

// One parameter. All five buffers have the dtype, count and order of `pair`.
struct SurgeryAdamwTask {
  SurgeryTask pair;
  void* param;
  void* exp_avg;
  void* exp_avg_sq;
  float* step;  // t, one element
};

inline int64_t elements_of(const SurgeryAdamwTask& task) { return task.pair.count; }

struct AdamwOptions {
  double lr, beta1, beta2, eps, weight_decay;
};

// What one parameter's update needs of the options and of t.
struct AdamwScalars {
  float decay;      // -lr weight_decay
  float rate1;      // 1 - beta1
  float beta2;
  float rate2;      // 1 - beta2
  float step_size;  // lr / (1 - beta1^t)
  float inv_sqrt;   // 1 / sqrt(1 - beta2^t)
  float eps;
};

// ---- CPU -------------------------------------------------------------------------------------
void surgery_adamw_cpu_update(const SurgeryAdamwTask& task, int64_t tile, float coefficient,
                              const AdamwScalars& scalars);

// ---- CUDA ------------------------------------------------------------------------------------
struct SurgeryAdamwCudaCall {
  const SurgeryAdamwTask* tasks;  // host array
  int64_t num_tasks;
  float* const* steps;  // host array: every counter once
  int64_t num_steps;
  int64_t num_groups;
  AdamwOptions options;
  double rho;
  const double* sums;  // [num_groups][kSurgerySums]
  double* out;         // [num_groups][kSurgeryResults]
  void* stream;        // cudaStream_t
};
// If any group's coefficient is NaN, nothing is updated and all coefficients in `out` are NaN.
Status surgery_adamw_cuda(const SurgeryAdamwCudaCall& call);

}  // namespace gradsafe

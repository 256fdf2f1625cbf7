// Schemas of all tensor operators. Their CPU and CUDA kernels register in cpu.cpp and cuda.cpp,
// their fake kernels in gradsafe/ops.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(gradsafe, m) {
  // refs holds num_refs references per gradient, gradient by gradient. axis: 0 tensor, 1 row,
  // 2 column, 3 both. Returns one float64 vector; gradsafe/ops/moments.py describes its layout.
  m.def(
      "moments(Tensor[] grads, Tensor[] refs, int num_refs, int axis, bool unsigned) -> Tensor");
  // x [B, T, I], dy [B, T, O], refs [O, I]; lengths: tokens of each sample, from its first. Returns
  // one float64 matrix [B, ...]; each row has the layout of one gradient of moments.
  m.def(
      "wgrad_moments(Tensor x, Tensor dy, Tensor[] refs, int[] lengths, int axis, bool unsigned) "
      "-> Tensor");
  // x [N, I], dy [N, O], refs [E, O, I]; segments of lengths[s] rows, of expert experts[s]. Returns
  // [S, ...], like wgrad_moments.
  m.def(
      "grouped_wgrad_moments(Tensor x, Tensor dy, Tensor[] refs, int[] lengths, int[] experts, "
      "int axis, bool unsigned) -> Tensor");
  // queries [Q, D], rows [N, D] -> scores [Q, k] float32, indices [Q, k] int64, counted from start.
  m.def("cosine_topk(Tensor queries, Tensor rows, int k, int start) -> (Tensor, Tensor)");
  // groups: the conflict test of each tensor, or [] for a single one. Sums: float64
  // [num_groups, 3] = dot, sq_user, sq_align; results: the same and the coefficient.
  m.def("surgery_sums(Tensor[] user, Tensor[] align, int[] groups, int num_groups) -> Tensor");
  m.def(
      "surgery_merge_(Tensor(a!)[] user, Tensor[] align, Tensor sums, float rho, int[] groups) "
      "-> Tensor");
  m.def(
      "surgery_(Tensor(a!)[] user, Tensor[] align, float rho, int[] groups, int num_groups) "
      "-> Tensor");
  // steps: one counter per parameter, or a single one for all. Without sums they are computed.
  m.def(
      "surgery_adamw_(Tensor(a!)[] params, Tensor[] user, Tensor[] align, Tensor(b!)[] exp_avg, "
      "Tensor(c!)[] exp_avg_sq, Tensor(d!)[] steps, Tensor? sums, float rho, float lr, "
      "float beta1, float beta2, float eps, float weight_decay, int[] groups, int num_groups) "
      "-> Tensor");
  // basis: for each tensor k vectors [k, ...]; direction [k] float64. Returns float64 [2 + 2 k]:
  // conflict, sq_user, dots, coefficients.
  m.def(
      "subspace_surgery_(Tensor(a!)[] user, Tensor[] basis, Tensor direction, float rho) "
      "-> Tensor");
  // student, teacher [N, V] logits; weight [N] float32. Returns KL(teacher || student) per row,
  // float32 [N]; the form with _ writes the gradient of sum weight * KL over the student's logits.
  m.def("kl_divergence(Tensor student, Tensor teacher) -> Tensor");
  m.def("kl_divergence_(Tensor(a!) student, Tensor teacher, Tensor weight) -> Tensor");
}

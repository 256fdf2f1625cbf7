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
  // student, teacher [N, V] logits; weight [N] float32. Returns KL(teacher || student) per row,
  // float32 [N]; the form with _ writes the gradient of sum weight * KL over the student's logits.
  m.def("kl_divergence(Tensor student, Tensor teacher) -> Tensor");
  m.def("kl_divergence_(Tensor(a!) student, Tensor teacher, Tensor weight) -> Tensor");
}

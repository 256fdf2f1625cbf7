// Moments of weight gradients that are never stored: G_b = dy_b^T x_b for every sample b of a batch.
//
// The samples of `grouped_wgrad_moments` are its segments: each belongs to one expert, whose
// matrices of the references it is scored against.
#pragma once

#include "gradsafe/moments.h"

namespace gradsafe {

// Sample b owns rows [starts[b], starts[b] + lengths[b]) of the matrices x and dy.
struct WgradProblem {
  DType dtype;      // of x and dy
  DType ref_dtype;
  Axis axis;
  int32_t num_refs;
  bool unsigned_dots;
  int64_t samples;   // B
  int64_t in_features, out_features;  // I, O
  const void* x;     // element (t, i) at x[t * x_stride + i]
  const void* dy;    // element (t, o) at dy[t * dy_stride + o]
  int64_t x_stride, dy_stride;
  const int64_t* starts;   // host array [B]: first row of each sample in x and dy
  const int64_t* lengths;  // host array [B]: rows (tokens) of each sample, may be 0
  const int64_t* experts;  // host array [B]: whose references a sample is scored against; or null
  const void* refs[kMaxRefs];        // [O, I] each; with experts [E, O, I]
  int64_t ref_strides[kMaxRefs];     // between rows
  int64_t expert_strides[kMaxRefs];  // between experts; not read without
};

// Samples that share their references: the matrices of `expert`, 0 without experts.
struct SampleGroup {
  int64_t expert;
  const int64_t* samples;  // ascending
  int64_t count;
};

// ---- CPU -------------------------------------------------------------------------------------
// Tokens of one sample that contribute to its gradient (csrc/cpu/kernels.h, is_idle_token).
struct ActiveTokens {
  const int32_t* tokens;
  int64_t count;
  bool pairs;  // they can be multiplied two at a time
};

MomentsTiling tile_wgrad_moments_cpu(const WgradProblem& problem);
int64_t wgrad_moments_cpu_workspace(const WgradProblem& problem);  // float64 elements per sample
int64_t wgrad_moments_cpu_scratch(int64_t tokens);  // float32 elements per thread
// Writes the active rows of `sample` to `tokens` (room for its length), and returns what it found.
ActiveTokens find_active_tokens(const WgradProblem& problem, int64_t sample, int32_t* tokens);
// One tile of every sample of a group on the calling thread. `active` has one entry per sample of
// the problem, `workspace` one part per sample of the group, in its order; `scratch` has room for
// `scratch_tokens` tokens, the longest sample's.
void wgrad_moments_cpu_tile(const WgradProblem& problem, const SampleGroup& group,
                            const ActiveTokens* active, int64_t tile, double* workspace,
                            float* scratch, int64_t scratch_tokens);
// `workspace` is one sample's part.
void wgrad_moments_cpu_finish(const WgradProblem& problem, const double* workspace, double* out);

// ---- CUDA ------------------------------------------------------------------------------------
// `out` holds, per sample, what MomentsTask results hold: [reported][slices] for rows, then columns.
struct WgradCudaCall {
  WgradProblem problem;
  double* out;
  void* workspace;   // of wgrad_moments_cuda_workspace(), 16-byte aligned
  void* stream;
};
// Bytes, for the current device.
Status wgrad_moments_cuda_workspace(const WgradProblem& problem, int64_t& bytes);
Status wgrad_moments_cuda(const WgradCudaCall& call);

}  // namespace gradsafe

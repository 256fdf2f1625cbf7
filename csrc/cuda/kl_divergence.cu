// kl_divergence: one block per row of logits, two reads of the row.
//
// The first read finds maxima and sums together: every thread keeps sums relative to the largest
// logits it has met and moves them when a larger one comes. The block brings them to common maxima
// and adds them in a fixed order in float64. The second read, which mostly hits L2, writes the
// gradient. Which thread owns which columns depends on the dtypes and the vocabulary only, so a
// result depends neither on alignment nor on the number of blocks.
#include <algorithm>

#include "../common/kl_value.h"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "gradsafe/kl_divergence.h"

namespace gradsafe {
namespace {

constexpr int kThreads = 512;
constexpr int kBlocksPerSm = 2;
constexpr int kWarps = kThreads / kWarp;
constexpr int kPacksInFlight = 2;  // of each side
constexpr int64_t kMaxBlocks = 16384;  // further rows are taken in turns

struct Call {
  KlProblem problem;
  bool student_aligned, teacher_aligned;  // every row starts on a 16-byte border
};

// N neighbouring logits; -inf behind the end of the row, which adds nothing.
template <bool kLast, class T, int N>
__device__ inline void read_logits(const T* row, int64_t col, int64_t end, bool aligned,
                                   float (&out)[N]) {
  if (aligned && end - col >= N) {
    load_pack<T, N, kLast>(row + col, out);
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = col + i < end ? widen(row[col + i]) : -INFINITY;
}

template <class T, int N>
__device__ inline void write_logits(T* row, int64_t col, int64_t end, bool aligned,
                                    const float (&values)[N]) {
  if (aligned && end - col >= N) {
    store_pack(row + col, values);
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (col + i < end) row[col + i] = narrow<T>(values[i]);
  }
}

// Sums of one thread, relative to the largest logits it has met.
struct Running {
  KlMaxima maxima{kLowestLogit, kLowestLogit};
  float student = 0, teacher = 0, cross = 0;

  __device__ void move_to(const KlMaxima& larger) {
    student *= expf(maxima.student - larger.student);
    const float factor = expf(maxima.teacher - larger.teacher);
    teacher *= factor;
    cross = moved_cross(cross, factor);
    maxima = larger;
  }

  // fmaxf passes NaN over; the exponentials then carry it into the sums.
  template <int M, int N>
  __device__ void add(const float (&s)[M][N], const float (&t)[M][N]) {
    KlMaxima larger = maxima;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        larger.student = fmaxf(larger.student, s[m][i]);
        larger.teacher = fmaxf(larger.teacher, t[m][i]);
      }
    }
    if (larger.student > maxima.student || larger.teacher > maxima.teacher) move_to(larger);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      // Packs are summed first, which keeps the thread's float32 chain short.
      float pack_student = 0, pack_teacher = 0, pack_cross = 0;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float e = expf(t[m][i] - maxima.teacher);
        pack_student += expf(s[m][i] - maxima.student);
        pack_teacher += e;
        // 0 * (-inf - s) and 0 * (t + inf) are 0 here: what has no probability has no share.
        pack_cross += e == 0.0f ? 0.0f : e * (t[m][i] - s[m][i]);
      }
      student += pack_student;
      teacher += pack_teacher;
      cross += pack_cross;
    }
  }
};

__device__ inline float warp_max(float value) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, mask));
  }
  return value;
}

// The block's maxima, for every thread. `shared` holds two floats per warp.
__device__ inline KlMaxima block_maxima(const KlMaxima& own, float* shared) {
  const float student = warp_max(own.student), teacher = warp_max(own.teacher);
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp == 0) {
    shared[warp] = student;
    shared[kWarps + warp] = teacher;
  }
  __syncthreads();
  KlMaxima all = own;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    all.student = fmaxf(all.student, shared[w]);
    all.teacher = fmaxf(all.teacher, shared[kWarps + w]);
  }
  return all;
}

template <class S, class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    kl_rows(const __grid_constant__ Call call) {
  constexpr int N = kPackSize<S, T>;
  constexpr int64_t kStep = kThreads * N;
  __shared__ float maxima_shared[2 * kWarps];
  __shared__ double sums_shared[3 * kWarps];
  __shared__ double totals[3];
  const KlProblem& p = call.problem;
  const int64_t end = p.vocabulary;

  // A row's barriers also separate its shared memory from the next row's.
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const S* student = static_cast<const S*>(p.student) + row * p.student_stride;
    const T* teacher = static_cast<const T*>(p.teacher) + row * p.teacher_stride;
    Running own;
    for (int64_t col = threadIdx.x * N; col < end; col += kPacksInFlight * kStep) {
      float s[kPacksInFlight][N], t[kPacksInFlight][N];
#pragma unroll
      for (int m = 0; m < kPacksInFlight; ++m) {
        read_logits<false>(student, col + m * kStep, end, call.student_aligned, s[m]);
        read_logits<false>(teacher, col + m * kStep, end, call.teacher_aligned, t[m]);
      }
      own.add(s, t);
    }
    const KlMaxima maxima = block_maxima(own.maxima, maxima_shared);
    own.move_to(maxima);
    const double sums[3] = {own.student, own.teacher, own.cross};
    block_sum_to(sums, sums_shared, totals);
    __syncthreads();
    if (threadIdx.x == 0) p.out[row] = kl_value(maxima, {totals[0], totals[1], totals[2]});
    if (p.gradient == nullptr) continue;

    const float weight = p.weight[row];
    const float student_scale = static_cast<float>(1.0 / totals[0]);
    const float teacher_scale = static_cast<float>(1.0 / totals[1]);
    S* gradient = static_cast<S*>(p.gradient) + row * p.student_stride;
    for (int64_t col = threadIdx.x * N; col < end; col += kStep) {
      float s[N] = {}, t[N];
      if (weight != 0.0f) {  // 0 gives +0, whatever the logits hold
        read_logits<true>(student, col, end, call.student_aligned, s);
        read_logits<true>(teacher, col, end, call.teacher_aligned, t);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          // Never fused: equal logits must give exactly 0.
          const float target = __fmul_rn(expf(t[i] - maxima.teacher), teacher_scale);
          s[i] = weight * (__fmul_rn(expf(s[i] - maxima.student), student_scale) - target);
        }
      }
      write_logits(gradient, col, end, call.student_aligned, s);
    }
  }
}

// ---- host ------------------------------------------------------------------------------------
bool starts_aligned(const void* data, int64_t stride, int64_t rows, DType dtype) {
  return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 &&
         (rows <= 1 || stride * size_of(dtype) % kVectorBytes == 0);
}

using Kernel = void (*)(Call);

template <class S>
Kernel choose_teacher(DType dtype) {
  switch (dtype) {
    case DType::f32: return &kl_rows<S, float>;
    case DType::bf16: return &kl_rows<S, bf16>;
    default: return &kl_rows<S, f16>;
  }
}

Kernel choose(const KlProblem& p) {
  switch (p.student_dtype) {
    case DType::f32: return choose_teacher<float>(p.teacher_dtype);
    case DType::bf16: return choose_teacher<bf16>(p.teacher_dtype);
    default: return choose_teacher<f16>(p.teacher_dtype);
  }
}

}  // namespace

Status kl_divergence_cuda(const KlProblem& p, void* stream) {
  Call call{};
  call.problem = p;
  call.student_aligned = starts_aligned(p.student, p.student_stride, p.rows, p.student_dtype);
  call.teacher_aligned = starts_aligned(p.teacher, p.teacher_stride, p.rows, p.teacher_dtype);
  const dim3 grid(static_cast<unsigned>(std::min(p.rows, kMaxBlocks)));
  return launch(choose(p), grid, dim3(kThreads), 0, stream, call);
}

}  // namespace gradsafe

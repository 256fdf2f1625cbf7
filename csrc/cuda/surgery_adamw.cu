// surgery_adamw: the merge of surgery.cu and the AdamW step in one pass over five lists.
//
// The first kernel turns the sums into coefficients, decides whether the step takes place at all,
// and advances the step counters; the second updates. Both read everything from the device.
#include "gradsafe/surgery_adamw.h"

#include <algorithm>

#include "../common/surgery_math.h"
#include "common/find_entry.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

namespace gradsafe {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 3;  // at least; more would leave too few registers for five lists
constexpr int kInFlight = 1;     // words of each of the five lists a thread asks for at once
static_assert(kSurgeryTile % (kThreads * kInFlight * kVectorBytes / 2) == 0,
              "a whole tile has no ragged steps, even in 16-bit types");

struct Entry {
  SurgeryAdamwTask task;
  int64_t first_tile;  // of this parameter, within the launch
};

// Kernel arguments may take 32,764 bytes (CUDA 12.1 and later, compute capability 7.0 and later).
constexpr int kMaxEntries = 400;
struct Batch {
  Entry entries[kMaxEntries];
  const double* results;  // [groups][kSurgeryResults]
  AdamwOptions options;
  int64_t tiles;
  int32_t count;
};
static_assert(sizeof(Batch) <= 32764, "the batch must fit the kernel arguments");

constexpr int kMaxSteps = 4000;
struct Advance {
  float* steps[kMaxSteps];
  const double* sums;  // [groups][kSurgerySums]
  double* out;         // [groups][kSurgeryResults]
  double rho;
  int64_t groups;
  int32_t count;
  bool first_launch;
};
static_assert(sizeof(Advance) <= 32764, "the step counters must fit the kernel arguments");

// One block. A step that one group cannot take is taken by none: the counters may be shared.
__global__ void __launch_bounds__(kThreads) advance_steps(const __grid_constant__ Advance a) {
  __shared__ double shared[kThreads / kWarp];
  __shared__ double invalid;
  double mine[1] = {};
  for (int64_t g = threadIdx.x; g < a.groups; g += kThreads) {
    const double coefficient = surgery_coefficient(a.sums + g * kSurgerySums, a.rho);
    if (coefficient != coefficient) mine[0] += 1;
  }
  block_sum_to(mine, shared, &invalid);
  __syncthreads();
  const bool valid = invalid == 0;
  if (a.first_launch) {
    for (int64_t g = threadIdx.x; g < a.groups; g += kThreads) {
      const double* sums = a.sums + g * kSurgerySums;
      double* out = a.out + g * kSurgeryResults;
#pragma unroll
      for (int q = 0; q < kSurgerySums; ++q) out[q] = sums[q];
      out[kCoefficient] = valid ? surgery_coefficient(sums, a.rho)
                                : std::numeric_limits<double>::quiet_NaN();
    }
  }
  if (!valid) return;
  for (int i = threadIdx.x; i < a.count; i += kThreads) *a.steps[i] += 1;
}

template <class T, bool kWhole>
__device__ inline void update_tile(const SurgeryAdamwTask& task, int64_t begin, int64_t end,
                                   float coefficient, const AdamwScalars& s) {
  constexpr int N = kWordSize<T>, kStep = kThreads * N;
  const T* user = static_cast<const T*>(task.pair.user);
  const T* align = static_cast<const T*>(task.pair.align);
  T* param = static_cast<T*>(task.param);
  T* exp_avg = static_cast<T*>(task.exp_avg);
  T* exp_avg_sq = static_cast<T*>(task.exp_avg_sq);
  for (int64_t base = begin + threadIdx.x * N; base < end; base += kStep * kInFlight) {
    Word<T> u[kInFlight], a[kInFlight], p[kInFlight], m[kInFlight], v[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t i = base + j * kStep;
      u[j] = load_word<kWhole>(user + i, end - i);
      a[j] = load_word<kWhole>(align + i, end - i);
      p[j] = load_word<kWhole>(param + i, end - i);
      m[j] = load_word<kWhole>(exp_avg + i, end - i);
      v[j] = load_word<kWhole>(exp_avg_sq + i, end - i);
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t i = base + j * kStep;
      float params[N], means[N], squares[N];
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float g = fmaf(coefficient, widen_at(a[j], n), widen_at(u[j], n));
        const float first = widen_at(m[j], n);
        const float mean = fmaf(s.rate1, g - first, first);
        const float square = fmaf(s.rate2, g * g, s.beta2 * widen_at(v[j], n));
        const float denominator = fmaf(sqrtf(square), s.inv_sqrt, s.eps);
        const float param = widen_at(p[j], n);
        const float decayed = fmaf(s.decay, param, param);
        params[n] = fmaf(-s.step_size, mean / denominator, decayed);
        means[n] = mean;
        squares[n] = square;
      }
      store_word<kWhole>(param + i, end - i, narrow_pack<T, N>(params));
      store_word<kWhole>(exp_avg + i, end - i, narrow_pack<T, N>(means));
      store_word<kWhole>(exp_avg_sq + i, end - i, narrow_pack<T, N>(squares));
    }
  }
}

template <bool kWhole>
__device__ inline void update_by_dtype(const SurgeryAdamwTask& task, int64_t begin, int64_t end,
                                       float coefficient, const AdamwScalars& s) {
  switch (task.pair.dtype) {
    case DType::f32: return update_tile<float, kWhole>(task, begin, end, coefficient, s);
    case DType::bf16: return update_tile<bf16, kWhole>(task, begin, end, coefficient, s);
    case DType::f16: return update_tile<f16, kWhole>(task, begin, end, coefficient, s);
    case DType::f8: return;  // a reference type only
  }
}

__device__ inline bool is_aligned(const SurgeryAdamwTask& task) {
  const uintptr_t places = reinterpret_cast<uintptr_t>(task.pair.user) |
                           reinterpret_cast<uintptr_t>(task.pair.align) |
                           reinterpret_cast<uintptr_t>(task.param) |
                           reinterpret_cast<uintptr_t>(task.exp_avg) |
                           reinterpret_cast<uintptr_t>(task.exp_avg_sq);
  return places % kVectorBytes == 0;
}

__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    surgery_adamw(const __grid_constant__ Batch batch) {
  __shared__ AdamwScalars shared;
  const int64_t tile = batch.tiles - 1 - blockIdx.x;  // reverse: see surgery.cu
  const Entry& e = find_entry(batch, tile);
  const double* result = batch.results + e.task.pair.group * kSurgeryResults;
  const float coefficient = static_cast<float>(result[kCoefficient]);
  if (coefficient != coefficient) return;
  if (threadIdx.x == 0) shared = adamw_scalars(batch.options, *e.task.step);
  __syncthreads();
  const AdamwScalars scalars = shared;
  const int64_t begin = (tile - e.first_tile) * kSurgeryTile;
  const int64_t end = min(begin + kSurgeryTile, e.task.pair.count);
  if (end - begin == kSurgeryTile && is_aligned(e.task)) {
    update_by_dtype<true>(e.task, begin, end, coefficient, scalars);
  } else {
    update_by_dtype<false>(e.task, begin, end, coefficient, scalars);
  }
}

Status advance(const SurgeryAdamwCudaCall& call) {
  int64_t begin = 0;
  do {  // also without counters: the results are wanted
    Advance a{};
    a.count = static_cast<int32_t>(std::min<int64_t>(kMaxSteps, call.num_steps - begin));
    std::copy_n(call.steps + begin, a.count, a.steps);
    a.sums = call.sums;
    a.out = call.out;
    a.rho = call.rho;
    a.groups = call.num_groups;
    a.first_launch = begin == 0;
    const Status status = launch(&advance_steps, dim3(1), dim3(kThreads), 0, call.stream, a);
    if (!status.ok()) return status;
    begin += kMaxSteps;
  } while (begin < call.num_steps);
  return {};
}

}  // namespace

Status surgery_adamw_cuda(const SurgeryAdamwCudaCall& call) {
  Status status = advance(call);
  if (!status.ok()) return status;
  int64_t next = 0;
  while (next < call.num_tasks) {
    Batch batch{};
    batch.results = call.out;
    batch.options = call.options;
    fill_entries(batch, call.num_tasks, next,
                 [&](int64_t i) -> const SurgeryAdamwTask& { return call.tasks[i]; });
    const dim3 grid(static_cast<unsigned>(batch.tiles));
    status = launch(&surgery_adamw, grid, dim3(kThreads), 0, call.stream, batch);
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace gradsafe

// surgery: one conflict test per group of tensors, then projection and merge in place.
//
// Stage 1 gives every tile to one block, which writes the tile's sums; stage 2 adds a group's tiles
// in index order in float64; the merge reads the gate from the device, so nothing waits for the
// host. It takes the tiles in reverse: the end of the lists is still in L2 from stage 1. All
// metadata travels in kernel arguments, which keeps the call safe under CUDA-graph capture.
#include "gradsafe/surgery.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "../common/surgery_math.h"
#include "common/find_entry.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

namespace gradsafe {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kFinishThreads = 1024;  // one block adds all tiles of a group
constexpr int kInFlight = 4;          // words of each list a thread asks for at once
static_assert(kSurgeryTile % (kThreads * kInFlight * kVectorBytes / 2) == 0,
              "a whole tile has no ragged steps, even in 16-bit types");

struct Entry {
  SurgeryTask task;
  int64_t first_tile;  // of this tensor, within the launch
};

// Kernel arguments may take 32,764 bytes (CUDA 12.1 and later, compute capability 7.0 and later).
constexpr int kMaxEntries = 800;
struct Batch {
  Entry entries[kMaxEntries];
  double* partials;      // [tiles of the call][kSurgerySums]
  const double* sums;    // [groups][kSurgerySums]
  double* out;           // [groups][kSurgeryResults]
  double rho;
  int64_t first_tile;    // of this launch, within the call
  int64_t tiles;
  int64_t groups;
  int32_t count;
  bool first_launch;
};
static_assert(sizeof(Batch) <= 32764, "the batch must fit the kernel arguments");

struct Span {
  int64_t begin, end;
  bool whole;  // a full tile, both sides on 16-byte borders
};

__device__ inline Span span_of(const Entry& e, int64_t tile) {
  Span s;
  s.begin = (tile - e.first_tile) * kSurgeryTile;
  s.end = min(s.begin + kSurgeryTile, e.task.count);
  const uintptr_t places =
      reinterpret_cast<uintptr_t>(e.task.user) | reinterpret_cast<uintptr_t>(e.task.align);
  s.whole = s.end - s.begin == kSurgeryTile && places % kVectorBytes == 0;
  return s;
}

// ---- sums ------------------------------------------------------------------------------------
template <class T, bool kWhole>
__device__ inline void sum_tile(const SurgeryTask& task, const Span& s,
                                float (&sums)[kSurgerySums]) {
  constexpr int N = kWordSize<T>, kStep = kThreads * N;
  const T* user = static_cast<const T*>(task.user);
  const T* align = static_cast<const T*>(task.align);
  for (int64_t base = s.begin + threadIdx.x * N; base < s.end; base += kStep * kInFlight) {
    Word<T> u[kInFlight], a[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t i = base + j * kStep;
      u[j] = load_word<kWhole>(user + i, s.end - i);
      a[j] = load_word<kWhole>(align + i, s.end - i);
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      // A word is summed first: a thread's float32 chain is then at most 32 steps long.
      float word[kSurgerySums] = {};
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float x = widen_at(u[j], n), y = widen_at(a[j], n);
        word[kDot] = fmaf(x, y, word[kDot]);
        word[kSqUser] = fmaf(x, x, word[kSqUser]);
        word[kSqAlign] = fmaf(y, y, word[kSqAlign]);
      }
#pragma unroll
      for (int q = 0; q < kSurgerySums; ++q) sums[q] += word[q];
    }
  }
}

template <bool kWhole>
__device__ inline void sum_by_dtype(const SurgeryTask& task, const Span& s,
                                    float (&sums)[kSurgerySums]) {
  switch (task.dtype) {
    case DType::f32: return sum_tile<float, kWhole>(task, s, sums);
    case DType::bf16: return sum_tile<bf16, kWhole>(task, s, sums);
    case DType::f16: return sum_tile<f16, kWhole>(task, s, sums);
    case DType::f8: return;  // a reference type only
  }
}

__global__ void __launch_bounds__(kThreads) surgery_sums(const __grid_constant__ Batch batch) {
  __shared__ double shared[kWarps * kSurgerySums];
  const Entry& e = find_entry(batch, blockIdx.x);
  const Span s = span_of(e, blockIdx.x);
  float sums[kSurgerySums] = {};
  if (s.whole) sum_by_dtype<true>(e.task, s, sums); else sum_by_dtype<false>(e.task, s, sums);
  double wide[kSurgerySums];
#pragma unroll
  for (int q = 0; q < kSurgerySums; ++q) wide[q] = sums[q];
  block_sum_to(wide, shared, batch.partials + (batch.first_tile + blockIdx.x) * kSurgerySums);
}

constexpr int kMaxGroups = 2048;
struct Groups {
  int64_t first_tile[kMaxGroups + 1];  // of each group, within the call
  const double* partials;
  double* sums;  // of the first of these groups
  int32_t count;
};
static_assert(sizeof(Groups) <= 32764, "the groups must fit the kernel arguments");

__global__ void __launch_bounds__(kFinishThreads)
    finish_surgery(const __grid_constant__ Groups groups) {
  __shared__ double shared[kFinishThreads / kWarp * kSurgerySums];
  const int64_t end = groups.first_tile[blockIdx.x + 1];
  double sums[kSurgerySums] = {};
#pragma unroll 4
  for (int64_t tile = groups.first_tile[blockIdx.x] + threadIdx.x; tile < end;
       tile += kFinishThreads) {
#pragma unroll
    for (int q = 0; q < kSurgerySums; ++q) sums[q] += groups.partials[tile * kSurgerySums + q];
  }
  block_sum_to(sums, shared, groups.sums + blockIdx.x * kSurgerySums);
}

// ---- merge -----------------------------------------------------------------------------------
template <class T, bool kWhole>
__device__ inline void merge_tile(const SurgeryTask& task, const Span& s, float coefficient) {
  constexpr int N = kWordSize<T>, kStep = kThreads * N;
  T* user = static_cast<T*>(task.user);
  const T* align = static_cast<const T*>(task.align);
  for (int64_t base = s.begin + threadIdx.x * N; base < s.end; base += kStep * kInFlight) {
    Word<T> u[kInFlight], a[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t i = base + j * kStep;
      u[j] = load_word<kWhole>(user + i, s.end - i);
      a[j] = load_word<kWhole>(align + i, s.end - i);
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t i = base + j * kStep;
      float merged[N];
#pragma unroll
      for (int n = 0; n < N; ++n) {
        merged[n] = fmaf(coefficient, widen_at(a[j], n), widen_at(u[j], n));
      }
      store_word<kWhole>(user + i, s.end - i, narrow_pack<T, N>(merged));
    }
  }
}

template <bool kWhole>
__device__ inline void merge_by_dtype(const SurgeryTask& task, const Span& s, float coefficient) {
  switch (task.dtype) {
    case DType::f32: return merge_tile<float, kWhole>(task, s, coefficient);
    case DType::bf16: return merge_tile<bf16, kWhole>(task, s, coefficient);
    case DType::f16: return merge_tile<f16, kWhole>(task, s, coefficient);
    case DType::f8: return;  // a reference type only
  }
}

__global__ void __launch_bounds__(kThreads) surgery_merge(const __grid_constant__ Batch batch) {
  if (batch.first_launch && blockIdx.x == 0) {  // the results, for whoever called
    for (int64_t g = threadIdx.x; g < batch.groups; g += kThreads) {
      const double* sums = batch.sums + g * kSurgerySums;
      double* out = batch.out + g * kSurgeryResults;
#pragma unroll
      for (int q = 0; q < kSurgerySums; ++q) out[q] = sums[q];
      out[kCoefficient] = surgery_coefficient(sums, batch.rho);
    }
  }
  if (batch.tiles == 0) return;
  const int64_t tile = batch.tiles - 1 - blockIdx.x;
  const Entry& e = find_entry(batch, tile);
  const float coefficient = static_cast<float>(
      surgery_coefficient(batch.sums + e.task.group * kSurgerySums, batch.rho));
  // Without anything to add, or without a valid sum, the user gradient is not even read.
  if (coefficient == 0 || coefficient != coefficient) return;
  const Span s = span_of(e, tile);
  if (s.whole) merge_by_dtype<true>(e.task, s, coefficient);
  else merge_by_dtype<false>(e.task, s, coefficient);
}

// ---- host ------------------------------------------------------------------------------------
// Tasks by group, in the order of the list within each: a group's partial sums lie together.
std::vector<int64_t> order_of(const SurgeryCudaCall& call) {
  std::vector<int64_t> order(static_cast<size_t>(call.num_tasks));
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return call.tasks[a].group < call.tasks[b].group;
  });
  return order;
}

// Runs `launch_batch` on parts of the list that fit a launch.
template <class LaunchBatch>
Status for_each_batch(const SurgeryCudaCall& call, Batch batch, const LaunchBatch& launch_batch) {
  const std::vector<int64_t> order = order_of(call);
  batch.groups = call.num_groups;
  batch.first_launch = true;
  int64_t next = 0;
  do {
    fill_entries(batch, call.num_tasks, next, [&](int64_t i) -> const SurgeryTask& {
      return call.tasks[order[static_cast<size_t>(i)]];
    });
    const Status status = launch_batch(batch);
    if (!status.ok()) return status;
    batch.first_tile += batch.tiles;
    batch.first_launch = false;
  } while (next < call.num_tasks);
  return {};
}

Status finish(const SurgeryCudaCall& call, const double* partials, double* sums) {
  std::vector<int64_t> first_tile(static_cast<size_t>(call.num_groups) + 1, 0);
  for (int64_t i = 0; i < call.num_tasks; ++i) {
    first_tile[call.tasks[i].group + 1] += surgery_tiles(call.tasks[i].count);
  }
  std::partial_sum(first_tile.begin(), first_tile.end(), first_tile.begin());
  for (int64_t begin = 0; begin < call.num_groups; begin += kMaxGroups) {
    Groups groups{};
    groups.count = static_cast<int32_t>(std::min<int64_t>(kMaxGroups, call.num_groups - begin));
    std::copy_n(first_tile.begin() + begin, groups.count + 1, groups.first_tile);
    groups.partials = partials;
    groups.sums = sums + begin * kSurgerySums;
    const Status status = launch(&finish_surgery, dim3(groups.count), dim3(kFinishThreads), 0,
                                 call.stream, groups);
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace

int64_t surgery_cuda_workspace(const SurgeryTask* tasks, int64_t num_tasks) {
  int64_t tiles = 0;
  for (int64_t i = 0; i < num_tasks; ++i) tiles += surgery_tiles(tasks[i].count);
  return tiles * kSurgerySums * 8;
}

Status surgery_cuda_sums(const SurgeryCudaCall& call, void* workspace, double* sums) {
  Batch all{};
  all.partials = static_cast<double*>(workspace);
  const Status status = for_each_batch(call, all, [&](const Batch& batch) {
    const dim3 grid(static_cast<unsigned>(batch.tiles));
    return launch(&surgery_sums, grid, dim3(kThreads), 0, call.stream, batch);
  });
  return status.ok() ? finish(call, all.partials, sums) : status;
}

Status surgery_cuda_merge(const SurgeryCudaCall& call, const double* sums, double rho,
                          double* out) {
  Batch all{};
  all.sums = sums;
  all.out = out;
  all.rho = rho;
  return for_each_batch(call, all, [&](const Batch& batch) {
    if (batch.tiles == 0 && !batch.first_launch) return Status{};
    const dim3 grid(static_cast<unsigned>(std::max<int64_t>(batch.tiles, 1)));
    return launch(&surgery_merge, grid, dim3(kThreads), 0, call.stream, batch);
  });
}

}  // namespace gradsafe

// Surgery with a subspace: all dots in one read, then the projection in place.
//
// Stage 1 gives every tile to one block, which reads the tensor once and each vector once; stage 2
// adds the tiles in index order in float64; stage 3 takes the tiles in reverse, as in surgery.cu,
// and computes the coefficients from the sums on the device. All metadata travels in kernel
// arguments.
#include "gradsafe/subspace_surgery.h"

#include <algorithm>

#include "../common/surgery_math.h"
#include "common/find_entry.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

namespace gradsafe {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kFinishThreads = 256;
constexpr int kInFlight = 4;  // words of a list a thread asks for at once
static_assert(kSurgeryTile % (kThreads * kInFlight * kVectorBytes / 2) == 0,
              "a whole tile has no ragged steps, even in 16-bit types");

struct Entry {
  SubspaceTask task;
  int64_t first_tile;  // of this tensor, within the launch
};

constexpr int kMaxEntries = 800;
struct Batch {
  Entry entries[kMaxEntries];
  double* partials;         // [tiles of the call][rank + 1]
  const double* sums;       // [rank + 1]
  const double* direction;  // [rank]
  double* out;              // [2 + 2 rank]
  double rho;
  int64_t first_tile;       // of this launch, within the call
  int64_t tiles;
  int32_t rank;
  int32_t count;
  bool first_launch;
};
static_assert(sizeof(Batch) <= 32764, "the batch must fit the kernel arguments");

struct Span {
  int64_t begin, end;
  bool whole;  // a full tile, the tensor and every vector on 16-byte borders
};

__device__ inline Span span_of(const Entry& e, int64_t tile, int rank) {
  Span s;
  s.begin = (tile - e.first_tile) * kSurgeryTile;
  s.end = min(s.begin + kSurgeryTile, e.task.count);
  uintptr_t places =
      reinterpret_cast<uintptr_t>(e.task.user) | reinterpret_cast<uintptr_t>(e.task.basis);
  const uintptr_t step =
      static_cast<uintptr_t>(e.task.count) * (e.task.dtype == DType::f32 ? 4u : 2u);
  if (rank > 1) places |= step;
  s.whole = s.end - s.begin == kSurgeryTile && places % kVectorBytes == 0;
  return s;
}

// ---- sums ------------------------------------------------------------------------------------
// Sums of products of the words of a thread. A word is summed first, which keeps chains short.
template <class T>
__device__ inline void add_products(const Word<T> (&a)[kInFlight], const Word<T> (&b)[kInFlight],
                                    float& total) {
#pragma unroll
  for (int j = 0; j < kInFlight; ++j) {
    float word = 0;
#pragma unroll
    for (int n = 0; n < kWordSize<T>; ++n) word = fmaf(widen_at(a[j], n), widen_at(b[j], n), word);
    total += word;
  }
}

template <class T, bool kWhole>
__device__ inline void load_words(const T* from, int64_t base, int64_t end,
                                  Word<T> (&words)[kInFlight]) {
#pragma unroll
  for (int j = 0; j < kInFlight; ++j) {
    const int64_t i = base + j * (kThreads * kWordSize<T>);
    words[j] = load_word<kWhole>(from + i, end - i);
  }
}

// kRank: a bound of the rank, so that the sums stay in registers.
template <class T, bool kWhole, int kRank>
__device__ inline void sum_tile(const SubspaceTask& task, int rank, const Span& s,
                                float (&sums)[kRank + 1]) {
  constexpr int N = kWordSize<T>, kStep = kThreads * N;
  const T* user = static_cast<const T*>(task.user);
  const T* basis = static_cast<const T*>(task.basis);
  for (int64_t base = s.begin + threadIdx.x * N; base < s.end; base += kStep * kInFlight) {
    Word<T> u[kInFlight];
    load_words<T, kWhole>(user, base, s.end, u);
    add_products<T>(u, u, sums[kRank]);
#pragma unroll
    for (int j = 0; j < kRank; ++j) {
      if (j >= rank) break;
      Word<T> v[kInFlight];
      load_words<T, kWhole>(basis + j * task.count, base, s.end, v);
      add_products<T>(u, v, sums[j]);
    }
  }
}

template <bool kWhole, int kRank>
__device__ inline void sum_by_dtype(const SubspaceTask& task, int rank, const Span& s,
                                    float (&sums)[kRank + 1]) {
  switch (task.dtype) {
    case DType::f32: return sum_tile<float, kWhole, kRank>(task, rank, s, sums);
    case DType::bf16: return sum_tile<bf16, kWhole, kRank>(task, rank, s, sums);
    case DType::f16: return sum_tile<f16, kWhole, kRank>(task, rank, s, sums);
    case DType::f8: return;  // a reference type only
  }
}

template <int kRank>
__global__ void __launch_bounds__(kThreads) subspace_sums(const __grid_constant__ Batch batch) {
  __shared__ double shared[kWarps * (kRank + 1)];
  __shared__ double totals[kRank + 1];
  const Entry& e = find_entry(batch, blockIdx.x);
  const Span s = span_of(e, blockIdx.x, batch.rank);
  float sums[kRank + 1] = {};
  if (s.whole) sum_by_dtype<true, kRank>(e.task, batch.rank, s, sums);
  else sum_by_dtype<false, kRank>(e.task, batch.rank, s, sums);
  double wide[kRank + 1];
#pragma unroll
  for (int q = 0; q <= kRank; ++q) wide[q] = sums[q];
  block_sum_to(wide, shared, totals);
  __syncthreads();
  // Places of vectors that do not exist are left out.
  const int q = static_cast<int>(threadIdx.x);
  if (q > batch.rank) return;
  double* const out = batch.partials + (batch.first_tile + blockIdx.x) * (batch.rank + 1);
  out[q] = totals[q == batch.rank ? kRank : q];
}

struct Finish {
  const double* partials;
  double* sums;
  int64_t tiles;
  int32_t width;  // sums of a tile
};

// One block per sum.
__global__ void __launch_bounds__(kFinishThreads)
    finish_subspace(const __grid_constant__ Finish finish) {
  __shared__ double shared[kFinishThreads / kWarp];
  double sums[1] = {};
#pragma unroll 4
  for (int64_t tile = threadIdx.x; tile < finish.tiles; tile += kFinishThreads) {
    sums[0] += finish.partials[tile * finish.width + blockIdx.x];
  }
  block_sum_to(sums, shared, finish.sums + blockIdx.x);
}

// ---- merge -----------------------------------------------------------------------------------
template <class T, bool kWhole>
__device__ inline void merge_tile(const SubspaceTask& task, int rank, const Span& s,
                                  const float* coefficients) {
  constexpr int N = kWordSize<T>, kStep = kThreads * N;
  T* user = static_cast<T*>(task.user);
  const T* basis = static_cast<const T*>(task.basis);
  for (int64_t base = s.begin + threadIdx.x * N; base < s.end; base += kStep * kInFlight) {
    // The vectors' sum is small against the element, which is added last and rounded once.
    float merged[kInFlight][N] = {};
    Word<T> words[kInFlight];
#pragma unroll 2
    for (int k = 0; k < rank; ++k) {
      load_words<T, kWhole>(basis + k * task.count, base, s.end, words);
      const float coefficient = coefficients[k];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
          merged[j][n] = fmaf(coefficient, widen_at(words[j], n), merged[j][n]);
        }
      }
    }
    load_words<T, kWhole>(user, base, s.end, words);
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
#pragma unroll
      for (int n = 0; n < N; ++n) merged[j][n] += widen_at(words[j], n);
      const int64_t i = base + j * kStep;
      store_word<kWhole>(user + i, s.end - i, narrow_pack<T, N>(merged[j]));
    }
  }
}

template <bool kWhole>
__device__ inline void merge_by_dtype(const SubspaceTask& task, int rank, const Span& s,
                                      const float* coefficients) {
  switch (task.dtype) {
    case DType::f32: return merge_tile<float, kWhole>(task, rank, s, coefficients);
    case DType::bf16: return merge_tile<bf16, kWhole>(task, rank, s, coefficients);
    case DType::f16: return merge_tile<f16, kWhole>(task, rank, s, coefficients);
    case DType::f8: return;  // a reference type only
  }
}

__global__ void __launch_bounds__(kThreads) subspace_merge(const __grid_constant__ Batch batch) {
  __shared__ float coefficients[kMaxRank];
  const int rank = batch.rank;
  const double conflict = subspace_conflict(batch.sums, batch.direction, rank, batch.rho);
  if (static_cast<int>(threadIdx.x) < rank) {
    const int j = static_cast<int>(threadIdx.x);
    const double c = subspace_coefficient(batch.sums, batch.direction, j, batch.rho, conflict);
    coefficients[j] = static_cast<float>(c);
    if (batch.first_launch && blockIdx.x == 0) {  // the results, for whoever called
      batch.out[2 + j] = batch.sums[j];
      batch.out[2 + rank + j] = c;
      if (j == 0) {
        batch.out[0] = conflict;
        batch.out[1] = batch.sums[rank];
      }
    }
  }
  __syncthreads();
  if (batch.tiles == 0 || conflict != conflict) return;
  bool idle = true;
  for (int j = 0; j < rank; ++j) idle = idle && coefficients[j] == 0;
  if (idle) return;  // the tensor is not even read
  const int64_t tile = batch.tiles - 1 - blockIdx.x;
  const Entry& e = find_entry(batch, tile);
  const Span s = span_of(e, tile, rank);
  if (s.whole) merge_by_dtype<true>(e.task, rank, s, coefficients);
  else merge_by_dtype<false>(e.task, rank, s, coefficients);
}

// ---- host ------------------------------------------------------------------------------------
// Runs `launch_batch` on parts of the list that fit a launch.
template <class LaunchBatch>
Status for_each_batch(const SubspaceCudaCall& call, Batch batch, const LaunchBatch& launch_batch) {
  batch.rank = call.rank;
  batch.first_launch = true;
  int64_t next = 0;
  do {
    fill_entries(batch, call.num_tasks, next,
                 [&](int64_t i) -> const SubspaceTask& { return call.tasks[i]; });
    const Status status = launch_batch(batch);
    if (!status.ok()) return status;
    batch.first_tile += batch.tiles;
    batch.first_launch = false;
  } while (next < call.num_tasks);
  return {};
}

using Kernel = void (*)(Batch);
Kernel sums_kernel(int rank) {
  return rank <= 4 ? &subspace_sums<4> : rank <= 8 ? &subspace_sums<8> : &subspace_sums<kMaxRank>;
}

int64_t tiles_of(const SubspaceCudaCall& call) {
  int64_t tiles = 0;
  for (int64_t i = 0; i < call.num_tasks; ++i) tiles += surgery_tiles(call.tasks[i].count);
  return tiles;
}

}  // namespace

// The sums of every tile, then those of the call.
int64_t subspace_cuda_workspace(const SubspaceCudaCall& call) {
  return (tiles_of(call) + 1) * subspace_width(call.rank) * 8;
}

Status subspace_cuda(const SubspaceCudaCall& call, void* workspace, double* out) {
  const int32_t width = subspace_width(call.rank);
  const int64_t tiles = tiles_of(call);
  Batch all{};
  all.partials = static_cast<double*>(workspace);
  double* const sums = all.partials + tiles * width;
  Status status = for_each_batch(call, all, [&](const Batch& batch) {
    const dim3 grid(static_cast<unsigned>(batch.tiles));
    return launch(sums_kernel(call.rank), grid, dim3(kThreads), 0, call.stream, batch);
  });
  if (!status.ok()) return status;
  const Finish finish{all.partials, sums, tiles, width};
  status = launch(&finish_subspace, dim3(static_cast<unsigned>(width)), dim3(kFinishThreads), 0,
                  call.stream, finish);
  if (!status.ok()) return status;
  all.sums = sums;
  all.direction = call.direction;
  all.out = out;
  all.rho = call.rho;
  return for_each_batch(call, all, [&](const Batch& batch) {
    if (batch.tiles == 0 && !batch.first_launch) return Status{};
    const dim3 grid(static_cast<unsigned>(std::max<int64_t>(batch.tiles, 1)));
    return launch(&subspace_merge, grid, dim3(kThreads), 0, call.stream, batch);
  });
}

}  // namespace gradsafe

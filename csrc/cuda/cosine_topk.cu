// cosine_topk: the best k rows for every query, while streaming over slabs of the rows.
//
// For every batch of kBatch queries and slab of kSlab rows three kernels run: one reads the slab
// once for its norms, one fills a buffer with the scores of batch and slab, and one joins them with
// the best keys so far, one block per query. The buffer (at most 16 MB) is used again for the next
// slab and stays in L2; Q x N exists nowhere. All sizes are known on the host, so nothing is
// synchronised, and the call is safe under CUDA-graph capture.
//
// Every score is a chain of products over kFold features in float32, folded into float64 in order,
// and does not depend on slabs or tiles; keys (topk_key.h) are ordered and all different, so neither
// does the order in which blocks and threads find them.
//
// What bounds it, for Q = 500, N = 5000, D = 8192 on an H200 (132 SMs at 1.755 GHz); estimates, to
// be confronted with a measurement:
//   float32: 41 GFLOP at about 45 TFLOP/s in fused multiply-adds                          0.9 ms
//   bf16:    632 tiles of 64 x 64 load 2 MB each from L2, 1.3 GB at about 5.5 TB/s         0.24 ms
//   both:    two waves of blocks of which the second is 60 % full; 500 selections a slab   x 1.2
//   HBM:     164 MB of float32 rows, read for the norms and again from L2 or HBM          0.07 ms
// The next steps would be tiles of 128 x 128 and cp.async where nothing needs scaling.
#include <algorithm>

#include "../common/cosine_scale.h"
#include "../common/tiling.h"
#include "../common/topk_key.h"
#include "common/cosine_tile.cuh"
#include "gradsafe/cosine_topk.h"

namespace gradsafe {
namespace {

constexpr int64_t kBatch = 1024;  // queries of one launch
constexpr int64_t kSlab = 4096;   // rows of one launch
constexpr int kFold = 256;        // features of a float32 chain
constexpr int kNormThreads = 256;
constexpr int kSelectThreads = 256;
constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;
static_assert(kBatch % kCosineTile == 0 && kSlab % kCosineTile == 0, "whole tiles");
static_assert(kDigits == 8 * kWarp, "a lane of one warp counts eight digits");

// ---- norms -------------------------------------------------------------------------------------
// One warp per vector; float64 squares can neither overflow nor vanish, so one read is enough.
// scale: a power of two. inverse: 1 / norm of the scaled vector, 0 for a zero vector, NaN for one
// that is not finite.
template <class T>
__global__ void __launch_bounds__(kNormThreads)
    cosine_norms(const T* data, int64_t stride, int64_t count, int64_t features, bool aligned,
                 double* inverses, float* scales) {
  constexpr int N = kPackSize<T, T>;
  const int64_t vector = int64_t{blockIdx.x} * (kNormThreads / kWarp) + threadIdx.x / kWarp;
  if (vector >= count) return;
  const int lane = threadIdx.x % kWarp;
  const T* from = data + vector * stride;
  double squares = 0;
  unsigned largest = 0;
  for (int64_t d = lane * N; d < features; d += kWarp * N) {
    float values[N];
    const int64_t left = features - d;
    if (aligned && left >= N) load_pack(from + d, values); else load_first(from + d, left, values);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      squares += double{values[i]} * double{values[i]};
      largest = max(largest, __float_as_uint(values[i]) & 0x7fffffffu);
    }
  }
  squares = warp_sum(squares);
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    largest = max(largest, __shfl_xor_sync(kAllLanes, largest, mask));
  }
  if (lane != 0) return;
  const bool finite = is_finite_magnitude(largest);
  const float scale = finite ? __uint_as_float(cosine_scale_bits(largest)) : 1.0f;
  double inverse = squares > 0 ? 1 / (sqrt(squares) * double{scale}) : 0.0;
  if (!finite) inverse = double{__uint_as_float(kNanBits)};
  inverses[vector] = inverse;
  scales[vector] = scale;
}

// ---- scores ------------------------------------------------------------------------------------
struct Scores {
  CosineOperand queries, rows;
  const double *query_inverses, *row_inverses;
  int64_t features;
  float* out;  // [queries][stride]
  int64_t stride;
};

template <class T>
__global__ void __launch_bounds__(kTileThreads, 3)
    cosine_scores(const __grid_constant__ Scores p) {
  using Tile = CosineTile<T>;
  __shared__ __align__(16) char stages[2][Tile::kStageBytes];
  const int64_t query0 = int64_t{blockIdx.y} * kCosineTile;
  const int64_t row0 = int64_t{blockIdx.x} * kCosineTile;
  const Tile tile(p.queries, p.rows, query0, row0, p.features);
  typename Tile::Sums sums = {};
  double totals[Tile::kM][Tile::kN][4] = {};
  typename Tile::Chunk ahead[Tile::kLoads];
  tile.load(ahead, 0);
  int use = 0;
#pragma unroll 1
  for (int64_t fold = 0; fold < p.features; fold += kFold) {
    const int64_t end = min(fold + kFold, p.features);
#pragma unroll 1
    for (int64_t d = fold; d < end; d += Tile::kStep, use ^= 1) {
      // Two buffers and one barrier: who still multiplies reads the other buffer.
      Tile::store(stages[use], ahead);
      __syncthreads();
      tile.load(ahead, d + Tile::kStep);  // zeros at the end
      Tile::multiply(sums, stages[use]);
    }
#pragma unroll
    for (int m = 0; m < Tile::kM; ++m) {
#pragma unroll
      for (int n = 0; n < Tile::kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          totals[m][n][e] += double{sums[m][n][e]};
          sums[m][n][e] = 0;
        }
      }
    }
  }
  const TilePlace<kCosineTile, kCosineTile> place;
#pragma unroll
  for (int m = 0; m < Tile::kM; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t query = query0 + place.row(m, e), row = row0 + place.col(n, e);
        if (query >= p.queries.count || row >= p.rows.count) continue;
        const double inverse = p.row_inverses[row] * p.query_inverses[query];
        // Rounding may carry a cosine past 1. NaN fails both comparisons and stays.
        const float cosine = static_cast<float>(totals[m][n][e] * inverse);
        const float low = cosine < -1.0f ? -1.0f : cosine;
        p.out[query * p.stride + row] = low > 1.0f ? 1.0f : low;
      }
    }
  }
}

// ---- selection ---------------------------------------------------------------------------------
struct Selection {
  const float* scores;  // [queries][stride], of the slab
  int64_t stride;
  uint64_t* best;  // [queries][k], best first
  int32_t k;
  int32_t seen;  // keys that `best` holds: min(k, rows before the slab)
  int32_t rows;  // of the slab
  uint32_t first_row;
  float* out_scores;  // [queries][k] for the last slab, else null
  int64_t* out_indices;
  int64_t start;
};

// Candidates of one query: the best so far, then the slab.
struct Candidates {
  const uint64_t* best;
  const float* scores;
  int seen, count;
  uint32_t first_row;

  __device__ uint64_t operator[](int i) const {
    if (i < seen) return best[i];
    return topk_key(__float_as_uint(scores[i - seen]), first_row + static_cast<uint32_t>(i - seen));
  }
};

// The digit in which the `wanted`-th largest key lies, and how many keys are wanted of those that
// have it; called by one warp.
struct Digit {
  int value, wanted, count;
};
__device__ inline Digit find_digit(const int* counts, int wanted) {
  constexpr int kEach = kDigits / kWarp;
  const int lane = threadIdx.x % kWarp;
  int own = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) own += counts[lane * kEach + i];
  int above = own;  // of this lane and those after it
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_down_sync(kAllLanes, above, static_cast<unsigned>(step));
    if (lane + step < kWarp) above += other;
  }
  above -= own;  // of the lanes after it
  Digit found{0, 0, 0};
  if (above < wanted && above + own >= wanted) {
    int left = wanted - above;
    for (int i = kEach - 1; i >= 0; --i) {
      const int count = counts[lane * kEach + i];
      if (count >= left) {
        found = {lane * kEach + i, left, count};
        break;
      }
      left -= count;
    }
  }
  const unsigned owner = __ballot_sync(kAllLanes, found.count > 0);
  const int from = __ffs(static_cast<int>(owner)) - 1;
  found.value = __shfl_sync(kAllLanes, found.value, from);
  found.wanted = __shfl_sync(kAllLanes, found.wanted, from);
  found.count = __shfl_sync(kAllLanes, found.count, from);
  return found;
}

// Sorts `size` keys (a power of two) in shared memory, largest first.
__device__ inline void sort_keys(uint64_t* keys, int size) {
  for (int run = 2; run <= size; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      for (int i = threadIdx.x; i < size / 2; i += kSelectThreads) {
        const int low = 2 * i - i % step, high = low + step;
        const bool descending = (low & run) == 0;
        const uint64_t a = keys[low], b = keys[high];
        if ((a < b) == descending) {
          keys[low] = b;
          keys[high] = a;
        }
      }
      __syncthreads();
    }
  }
}

// One block per query. A radix selection finds the smallest key that stays, one digit a round from
// the highest on; keys all differ, so exactly min(k, candidates) are not below it.
__global__ void __launch_bounds__(kSelectThreads)
    cosine_select(const __grid_constant__ Selection p) {
  __shared__ int counts[kDigits];
  __shared__ Digit digit;
  __shared__ int taken;
  __shared__ uint64_t keys[kMaxTopk];
  uint64_t* const best = p.best + int64_t{blockIdx.x} * p.k;
  const Candidates candidates{best, p.scores + blockIdx.x * p.stride, p.seen, p.seen + p.rows,
                              p.first_row};
  const int kept = min(p.k, candidates.count);
  int size = 1;
  while (size < kept) size *= 2;

  uint64_t smallest = 0;
  int wanted = kept;
  for (int shift = 64 - kDigitBits; shift >= 0; shift -= kDigitBits) {
    for (int i = threadIdx.x; i < kDigits; i += kSelectThreads) counts[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < candidates.count; i += kSelectThreads) {
      const uint64_t key = candidates[i];
      // Of the digits above, all agree; a shift by 64 is undefined, hence two.
      if (((key ^ smallest) >> shift >> kDigitBits) != 0) continue;
      atomicAdd(&counts[key >> shift & (kDigits - 1)], 1);
    }
    __syncthreads();
    if (threadIdx.x < kWarp) {
      const Digit found = find_digit(counts, wanted);
      if (threadIdx.x == 0) digit = found;
    }
    __syncthreads();
    smallest |= static_cast<uint64_t>(digit.value) << shift;
    wanted = digit.wanted;
    if (digit.count == wanted) break;  // all with this digit stay
  }

  if (threadIdx.x == 0) taken = 0;
  for (int i = kept + threadIdx.x; i < size; i += kSelectThreads) keys[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < candidates.count; i += kSelectThreads) {
    const uint64_t key = candidates[i];
    if (key >= smallest) keys[atomicAdd(&taken, 1)] = key;
  }
  __syncthreads();  // also: nobody reads `best` any more
  sort_keys(keys, size);
  for (int i = threadIdx.x; i < kept; i += kSelectThreads) {
    if (p.out_scores == nullptr) {
      best[i] = keys[i];
    } else {
      const int64_t at = int64_t{blockIdx.x} * p.k + i;
      p.out_scores[at] = __uint_as_float(key_score_bits(keys[i]));
      p.out_indices[at] = p.start + key_row(keys[i]);
    }
  }
}

// ---- host ------------------------------------------------------------------------------------
// Parts of the workspace, the widest elements first.
struct Buffers {
  int64_t batch, slab;
  double *query_inverses, *row_inverses;
  uint64_t* best;
  float *query_scales, *row_scales, *scores;
  int64_t bytes;

  Buffers(const CosineProblem& p, void* memory) {
    batch = std::min(p.queries, kBatch);
    slab = std::min(ceil_div(p.rows, kCosineTile) * kCosineTile, kSlab);
    query_inverses = static_cast<double*>(memory);
    row_inverses = query_inverses + batch;
    best = reinterpret_cast<uint64_t*>(row_inverses + slab);
    query_scales = reinterpret_cast<float*>(best + batch * p.k);
    row_scales = query_scales + batch;
    scores = row_scales + slab;
    bytes = (batch + slab + batch * p.k) * 8 + (batch + slab + batch * slab) * 4;
  }
};

// Whether every vector starts where a load of `bytes` may.
bool starts_aligned(const void* data, int64_t stride, int64_t element, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 && stride * element % bytes == 0;
}

const void* vector_at(const void* data, int64_t index, int64_t stride, DType dtype) {
  return static_cast<const char*>(data) + index * stride * size_of(dtype);
}

template <class T>
Status run_norms(const CosineOperand& from, int64_t features, double* inverses, float* scales,
                 void* stream) {
  const int64_t blocks = ceil_div(from.count, kNormThreads / kWarp);
  const bool aligned = starts_aligned(from.data, from.stride, sizeof(T), kVectorBytes);
  return launch(&cosine_norms<T>, dim3(static_cast<unsigned>(blocks)), dim3(kNormThreads), 0,
                stream, static_cast<const T*>(from.data), from.stride, from.count, features,
                aligned, inverses, scales);
}

Status norms(const CosineOperand& from, int64_t features, double* inverses, float* scales,
             void* stream) {
  switch (from.dtype) {
    case DType::f32: return run_norms<float>(from, features, inverses, scales, stream);
    case DType::bf16: return run_norms<bf16>(from, features, inverses, scales, stream);
    default: return run_norms<f16>(from, features, inverses, scales, stream);
  }
}

Status scores(const Scores& p, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.rows.count, kCosineTile)),
                  static_cast<unsigned>(ceil_div(p.queries.count, kCosineTile)));
  const dim3 block(kTileThreads);
  if (p.queries.dtype != p.rows.dtype || p.rows.dtype == DType::f32) {
    return launch(&cosine_scores<float>, grid, block, 0, stream, p);
  }
  if (p.rows.dtype == DType::bf16) return launch(&cosine_scores<bf16>, grid, block, 0, stream, p);
  return launch(&cosine_scores<f16>, grid, block, 0, stream, p);
}

CosineOperand operand(const void* data, int64_t stride, DType dtype, DType other, int64_t first,
                      int64_t count, const float* scales) {
  CosineOperand o{};
  o.data = vector_at(data, first, stride, dtype);
  o.stride = stride;
  o.count = count;
  o.scales = scales;
  o.dtype = dtype;
  // Four elements make a chunk of float32.
  const int64_t bytes = dtype == other ? kChunkBytes : 4 * size_of(dtype);
  o.aligned = starts_aligned(o.data, stride, size_of(dtype), bytes);
  return o;
}

}  // namespace

int64_t cosine_topk_cuda_workspace(const CosineProblem& problem) {
  return Buffers(problem, nullptr).bytes;
}

Status cosine_topk_cuda(const CosineCudaCall& call) {
  const CosineProblem& p = call.problem;
  if (p.queries == 0 || p.k == 0) return {};
  const Buffers buffers(p, call.workspace);
  Scores s{};
  s.query_inverses = buffers.query_inverses;
  s.row_inverses = buffers.row_inverses;
  s.features = p.features;
  s.out = buffers.scores;
  s.stride = buffers.slab;
  for (int64_t query = 0; query < p.queries; query += kBatch) {
    s.queries = operand(p.query_data, p.query_stride, p.query_dtype, p.row_dtype, query,
                        std::min(p.queries - query, kBatch), buffers.query_scales);
    Status status =
        norms(s.queries, p.features, buffers.query_inverses, buffers.query_scales, call.stream);
    if (!status.ok()) return status;
    for (int64_t row = 0; row < p.rows; row += kSlab) {
      s.rows = operand(p.row_data, p.row_stride, p.row_dtype, p.query_dtype, row,
                       std::min(p.rows - row, kSlab), buffers.row_scales);
      status = norms(s.rows, p.features, buffers.row_inverses, buffers.row_scales, call.stream);
      if (!status.ok()) return status;
      status = scores(s, call.stream);
      if (!status.ok()) return status;
      Selection select{};
      select.scores = s.out;
      select.stride = s.stride;
      select.best = buffers.best;
      select.k = static_cast<int32_t>(p.k);
      select.seen = static_cast<int32_t>(std::min(p.k, row));
      select.rows = static_cast<int32_t>(s.rows.count);
      select.first_row = static_cast<uint32_t>(row);
      select.start = p.start;
      if (row + kSlab >= p.rows) {
        select.out_scores = call.scores + query * p.k;
        select.out_indices = call.indices + query * p.k;
      }
      status = launch(&cosine_select, dim3(static_cast<unsigned>(s.queries.count)),
                      dim3(kSelectThreads), 0, call.stream, select);
      if (!status.ok()) return status;
    }
  }
  return {};
}

}  // namespace gradsafe

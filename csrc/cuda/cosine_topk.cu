// cosine_topk: the best k rows for every query, while streaming over slabs of the rows.
//
// For every batch of kBatch queries and slab of rows the scores are computed, and of those only the
// ones above the worst of the query's list are written, with a bit in a mask (cosine_scores.cuh);
// then one block per query joins them with its list (cosine_select.cuh). The first slab is small, so
// that later ones find lists to compare with: k * s / n scores of a slab of s rows are expected to
// pass after n rows. Q x N exists nowhere. All sizes are known on the host, so nothing is
// synchronised, and the call is safe under CUDA-graph capture.
//
// Two ways to the scores. Up to kFewQueries queries are packed once, and rows stream past them with
// their norms in one read (cosine_rows.cuh). For more queries one kernel reads the slab for its
// norms, and one multiplies tiles of queries and rows in the tensor cores (cosine_tile.cuh). More
// than kChunk features are cut into at most kMaxChunks chunks, so that few queries and rows still
// fill the device; a third kernel adds the chunks in float64. How features are cut depends on their
// number only, so a score depends neither on slabs, tiles nor the device.
//
// What bounds it; estimates for an H100 (132 SMs, 3.35 TB/s, mma.sync at 60 % of its peak), to be
// confronted with a measurement:
//   500 x 5000, D 8192, float32: 3 x 43 GFLOP in TF32 at 300 TFLOP/s      0.43 ms
//                                norms, 40 MB of chunks, selection         0.12 ms
//   the same, bf16:              640 tiles load 1 MB each from L2          0.13 ms, and 0.09 ms
//   500 x 500,000, D 2048, bf16: 1.05 TFLOP at 550 TFLOP/s                 1.9 ms, and 0.7 ms of norms
//   1 x 500,000, D 2048, bf16:   2.05 GB read once                         0.7 ms
#include <algorithm>

#include "../common/tiling.h"
#include "common/cosine_rows.cuh"
#include "common/cosine_scores.cuh"
#include "common/cosine_select.cuh"
#include "common/cosine_tile.cuh"
#include "gradsafe/cosine_topk.h"

namespace gradsafe {
namespace {

constexpr int64_t kBatch = 1024;            // queries of one launch
constexpr int64_t kFewQueries = 8;          // up to which rows stream past packed queries
constexpr int64_t kFirstSlab = 4096;        // rows
constexpr int64_t kGrowth = 8;              // a slab is at most so many times the rows before it
constexpr int64_t kMaxSlab = 131072;
constexpr int64_t kScoreBuffer = 1 << 25;   // numbers, of all chunks together
constexpr int64_t kMinSlab = 1024;          // however small the buffer
constexpr int64_t kChunk = 2048, kMaxChunks = 16;  // features; a multiple of every tile's stage
constexpr int64_t kFewTiles = 264;          // up to which tiles of half the size fill the SMs better
constexpr int kStages = 3;                  // of a tile's pipeline
constexpr int kRowThreads = 256;
constexpr int kRowsOfWarp = 8;              // of the streaming kernel
// Eight queries take 170 registers, of which twelve warps of an SM have that many.
template <int kQueries>
constexpr int kStreamThreads = kQueries > 1 ? 128 : 256;
template <int kQueries>
constexpr int kRowsOfBlock = kStreamThreads<kQueries> / kWarp * kRowsOfWarp;
static_assert(kRowsOfBlock<8> % kMaskBits == 0 && kRowsOfWarp % kRowsAtOnce == 0, "whole words");

// ---- norms -------------------------------------------------------------------------------------
template <class T>
__global__ void __launch_bounds__(kRowThreads, 2)
    cosine_norms(const T* data, int64_t stride, int64_t count, int64_t features, bool aligned,
                 double* inverses, float* scales) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t first = (int64_t{blockIdx.x} * (kRowThreads / kWarp) + warp) * kRowsAtOnce;
  if (first >= count) return;
  const int here = static_cast<int>(min(count - first, int64_t{kRowsAtOnce}));
  const RowResult result =
      RowProducts<T, 0>(data + first * stride, stride, here, features, aligned, nullptr, 0).result();
  const int row = lane / kLanesOfRow;
  if (lane % kLanesOfRow != 0 || row >= here) return;
  inverses[first + row] = result.inverse;
  scales[first + row] = result.scale;
}

// ---- few queries -------------------------------------------------------------------------------
struct PackedQueries {
  CosineOperand queries;
  int64_t features;
  float* packed;  // [queries or kFewQueries][stride], zeros behind the features and the queries
  int64_t stride;
};

template <class Row>
__global__ void __launch_bounds__(kRowThreads)
    cosine_pack_queries(const __grid_constant__ PackedQueries p) {
  const int64_t d = int64_t{blockIdx.x} * kRowThreads + threadIdx.x, query = blockIdx.y;
  if (d >= p.stride) return;
  const int64_t place = query * p.queries.stride + d;
  const bool exists = query < p.queries.count && d < p.features;
  float value = 0;
  if (exists) {
    switch (p.queries.dtype) {
      case DType::f32: value = static_cast<const float*>(p.queries.data)[place]; break;
      case DType::bf16: value = widen(static_cast<const bf16*>(p.queries.data)[place]); break;
      default: value = widen(static_cast<const f16*>(p.queries.data)[place]); break;
    }
    value *= p.queries.scales[query];
  }
  p.packed[query * p.stride + packed_place<Row>(d)] = value;
}

struct Stream {
  const void* data;
  int64_t stride, count, features;
  bool aligned;
  int queries;
  const float* packed;
  int64_t packed_stride;
  ScoreSlab slab;
};

// A block takes 64 or 32 rows, a warp eight of them, four at a time.
template <class T, int kQueries>
__global__ void __launch_bounds__(kStreamThreads<kQueries>, kQueries > 1 ? 3 : 2)
    cosine_stream(const __grid_constant__ Stream p) {
  constexpr int kWords = kRowsOfBlock<kQueries> / kMaskBits;
  __shared__ uint32_t masks[kQueries * kWords];
  if (threadIdx.x < kQueries * kWords) masks[threadIdx.x] = 0;
  __syncthreads();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int query = lane % kLanesOfRow;
  const int64_t block_row = int64_t{blockIdx.x} * kRowsOfBlock<kQueries>;
#pragma unroll 1
  for (int i = 0; i < kRowsOfWarp; i += kRowsAtOnce) {
    const int local = warp * kRowsOfWarp + i;
    const int64_t first = block_row + local;
    if (first >= p.count) break;
    const int here = static_cast<int>(min(p.count - first, int64_t{kRowsAtOnce}));
    const T* data = static_cast<const T*>(p.data) + first * p.stride;
    const RowResult result = RowProducts<T, kQueries>(data, p.stride, here, p.features, p.aligned,
                                                      p.packed, p.packed_stride).result();
    const int row = lane / kLanesOfRow;
    if (row >= here || query >= p.queries) continue;
    const float score = cosine_score(result.dot, result.inverse * p.slab.query_inverses[query]);
    const uint32_t key_row = p.slab.first_row + static_cast<uint32_t>(first + row);
    if (!Threshold(p.slab, query).passes(score, key_row)) continue;
    p.slab.scores[query * p.slab.stride + first + row] = score;
    atomicOr(&masks[query * kWords + (local + row) / kMaskBits], 1u << (local + row) % kMaskBits);
  }
  __syncthreads();
  const int64_t word = int64_t{blockIdx.x} * kWords + threadIdx.x % kWords;
  if (static_cast<int>(threadIdx.x) < p.queries * kWords && word * kMaskBits < p.count) {
    p.slab.masks[threadIdx.x / kWords * (p.slab.stride / kMaskBits) + word] = masks[threadIdx.x];
  }
}

// ---- many queries ------------------------------------------------------------------------------
struct Tiles {
  CosineOperand queries, rows;
  int64_t features, chunk;  // chunk: features of one block
  ScoreSlab slab;
};

// Adds one tile's sums to the lists' candidates.
template <class Tile, int kQueries>
__device__ inline void offer_scores(const Tiles& p, int64_t query0, int64_t row0,
                                    const typename Tile::Sums& sums) {
  const CosinePlace<kQueries> place;
  double inverses[Tile::kN][2];
#pragma unroll
  for (int n = 0; n < Tile::kN; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t row = row0 + place.row(n, e);
      inverses[n][e] = row < p.rows.count ? p.slab.row_inverses[row] : 0;
    }
  }
#pragma unroll
  for (int m = 0; m < Tile::kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t query = query0 + place.query(m, half);
      uint32_t bits = 0;
      if (query < p.queries.count) {
        const double inverse = p.slab.query_inverses[query];
        const Threshold threshold(p.slab, query);
#pragma unroll
        for (int n = 0; n < Tile::kN; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float sum = sums[m][n][2 * half + e];
            const float near =
                sum * static_cast<float>(inverse) * static_cast<float>(inverses[n][e]);
            const int64_t row = row0 + place.row(n, e);
            if (!threshold.may_pass(near) || row >= p.rows.count) continue;
            const float score = cosine_score(double{sum}, inverse * inverses[n][e]);
            if (!threshold.passes(score, p.slab.first_row + static_cast<uint32_t>(row))) continue;
            p.slab.scores[query * p.slab.stride + row] = score;
            bits |= 1u << (place.row(n, e) - place.warp_row);
          }
        }
      }
      // A warp's 32 rows of this query are in the four lanes with the same g.
      bits |= __shfl_xor_sync(kAllLanes, bits, 1);
      bits |= __shfl_xor_sync(kAllLanes, bits, 2);
      const int64_t row = row0 + place.warp_row;
      if (place.t == 0 && query < p.queries.count && row < p.rows.count) {
        p.slab.masks[query * (p.slab.stride / kMaskBits) + row / kMaskBits] = bits;
      }
    }
  }
}

template <class T, int kQueries>
__global__ void __launch_bounds__(kCosineThreads, kQueries > 64 ? 1 : 2)
    cosine_tiles(const __grid_constant__ Tiles p) {
  using Tile = CosineTile<T, kQueries>;
  static_assert(kChunk % Tile::kStep == 0, "only the last stage of all is ragged");
  GRADSAFE_DYNAMIC_SHARED(char, stages);
  const int64_t query0 = int64_t{blockIdx.x} * kQueries;
  const int64_t row0 = int64_t{blockIdx.y} * kCosineTileRows;
  const int64_t begin = blockIdx.z * p.chunk, end = min(begin + p.chunk, p.features);
  const Tile tile(p.queries, p.rows, query0, row0);
  typename Tile::Sums sums = {};
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    tile.load(stages + s * Tile::kStageBytes, begin + s * Tile::kStep, end);
    cp_async_commit();
  }
  int use = 0;
#pragma unroll 1
  for (int64_t d = begin; d < end; d += Tile::kStep) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // the stage is complete; nobody reads the one before it any more
    const int next = use == 0 ? kStages - 1 : use - 1;
    const int64_t ahead = d + (kStages - 1) * Tile::kStep;
    if (ahead < end) tile.load(stages + next * Tile::kStageBytes, ahead, end);
    cp_async_commit();
    Tile::multiply(sums, stages + use * Tile::kStageBytes);
    use = use == kStages - 1 ? 0 : use + 1;
  }
  cp_async_wait<0>();
  if (gridDim.z == 1) {
    offer_scores<Tile, kQueries>(p, query0, row0, sums);
    return;
  }
  const CosinePlace<kQueries> place;
#pragma unroll
  for (int m = 0; m < Tile::kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t query = query0 + place.query(m, half);
      if (query >= p.queries.count) continue;
      float* out = p.slab.scores + (blockIdx.z * p.queries.count + query) * p.slab.stride + row0;
#pragma unroll
      for (int n = 0; n < Tile::kN; ++n) {
        *reinterpret_cast<float2*>(out + place.row(n, 0)) =
            make_float2(sums[m][n][2 * half], sums[m][n][2 * half + 1]);
      }
    }
  }
}

// Adds the chunks of every product; the score replaces the first of them.
__global__ void __launch_bounds__(kRowThreads)
    cosine_join_chunks(const __grid_constant__ Tiles p, int chunks) {
  const int64_t row = int64_t{blockIdx.x} * kRowThreads + threadIdx.x, query = blockIdx.y;
  float* const at = p.slab.scores + query * p.slab.stride + row;
  bool passes = false;
  if (row < p.rows.count) {
    double total = 0;
#pragma unroll 4
    for (int chunk = 0; chunk < chunks; ++chunk) {
      total += double{at[chunk * p.queries.count * p.slab.stride]};
    }
    const float score =
        cosine_score(total, p.slab.query_inverses[query] * p.slab.row_inverses[row]);
    passes = Threshold(p.slab, query).passes(score, p.slab.first_row + static_cast<uint32_t>(row));
    if (passes) *at = score;
  }
  const unsigned bits = __ballot_sync(kAllLanes, passes);
  if (threadIdx.x % kMaskBits == 0 && row < p.rows.count) {
    p.slab.masks[query * (p.slab.stride / kMaskBits) + row / kMaskBits] = bits;
  }
}

// ---- host ------------------------------------------------------------------------------------
bool few_queries(const CosineProblem& p) { return p.queries <= kFewQueries; }

// One, or as many as the kernel for several multiplies.
int64_t packed_queries(int64_t queries) { return queries == 1 ? 1 : kFewQueries; }

// Features of a chunk: as few chunks as the limit allows, or all features if nothing is cut.
int64_t chunk_features(const CosineProblem& p) {
  if (few_queries(p) || p.features <= kChunk) return std::max<int64_t>(p.features, 1);
  return std::max(kChunk, ceil_div(ceil_div(p.features, kMaxChunks), kChunk) * kChunk);
}

// Parts of the workspace, the widest elements first.
struct Buffers {
  int64_t batch, slab, chunk, chunks, packed_stride;
  float* packed;
  double *query_inverses, *row_inverses;
  uint64_t* best;
  float* scores;
  uint32_t* masks;
  float *query_scales, *row_scales;
  int64_t bytes;

  Buffers(const CosineProblem& p, void* memory) {
    batch = std::min(p.queries, kBatch);
    chunk = chunk_features(p);
    chunks = std::max<int64_t>(ceil_div(p.features, chunk), 1);
    const int64_t fitting = kScoreBuffer / std::max<int64_t>(batch * chunks, 1);
    const int64_t limit = std::min(std::max(fitting, kMinSlab), kMaxSlab);
    slab = std::min(ceil_div(p.rows, kCosineTileRows), limit / kCosineTileRows) * kCosineTileRows;
    packed_stride = few_queries(p) ? ceil_div(p.features, kPackedStep) * kPackedStep : 0;
    packed = static_cast<float*>(memory);
    const int64_t packed_count = packed_queries(p.queries) * packed_stride;
    query_inverses = reinterpret_cast<double*>(packed + packed_count);
    row_inverses = query_inverses + batch;
    best = reinterpret_cast<uint64_t*>(row_inverses + slab);
    scores = reinterpret_cast<float*>(best + batch * p.k);
    masks = reinterpret_cast<uint32_t*>(scores + chunks * batch * slab);
    query_scales = reinterpret_cast<float*>(masks + batch * (slab / kMaskBits));
    row_scales = query_scales + batch;
    bytes = packed_count * 4 + (batch + slab + batch * p.k) * 8 +
            (chunks * batch * slab + batch * (slab / kMaskBits) + batch + slab) * 4;
  }
};

bool is_aligned(const CosineOperand& o) {
  return starts_aligned(o.data, o.stride, size_of(o.dtype));
}

// `count` vectors from `first` on; `tile` is the type in which tiles are multiplied.
CosineOperand operand(const void* data, int64_t stride, DType dtype, DType tile, int64_t first,
                      int64_t count, const float* scales) {
  CosineOperand o{};
  o.data = static_cast<const char*>(data) + first * stride * size_of(dtype);
  o.stride = stride;
  o.count = count;
  o.scales = scales;
  o.dtype = dtype;
  o.direct = dtype == tile && is_aligned(o);
  return o;
}

template <class T>
Status run_norms(const CosineOperand& from, int64_t features, double* inverses, float* scales,
                 void* stream) {
  const int64_t blocks = ceil_div(from.count, kRowThreads / kWarp * kRowsAtOnce);
  return launch(&cosine_norms<T>, dim3(static_cast<unsigned>(blocks)), dim3(kRowThreads), 0, stream,
                static_cast<const T*>(from.data), from.stride, from.count, features,
                is_aligned(from), inverses, scales);
}

Status norms(const CosineOperand& from, int64_t features, double* inverses, float* scales,
             void* stream) {
  switch (from.dtype) {
    case DType::f32: return run_norms<float>(from, features, inverses, scales, stream);
    case DType::bf16: return run_norms<bf16>(from, features, inverses, scales, stream);
    default: return run_norms<f16>(from, features, inverses, scales, stream);
  }
}

template <class T>
Status run_pack(const PackedQueries& p, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.stride, kRowThreads)),
                  static_cast<unsigned>(packed_queries(p.queries.count)));
  return launch(&cosine_pack_queries<T>, grid, dim3(kRowThreads), 0, stream, p);
}

// Packs queries in the order in which rows of this type meet them.
Status pack(const PackedQueries& p, DType rows, void* stream) {
  return rows == DType::f32 ? run_pack<float>(p, stream) : run_pack<bf16>(p, stream);
}

template <class T, int kQueries>
Status run_stream(const Stream& p, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.count, kRowsOfBlock<kQueries>)));
  return launch(&cosine_stream<T, kQueries>, grid, dim3(kStreamThreads<kQueries>), 0, stream, p);
}

template <class T>
Status choose_stream(const Stream& p, void* stream) {
  return p.queries == 1 ? run_stream<T, 1>(p, stream) : run_stream<T, kFewQueries>(p, stream);
}

Status stream_rows(const Stream& p, DType dtype, void* stream) {
  switch (dtype) {
    case DType::f32: return choose_stream<float>(p, stream);
    case DType::bf16: return choose_stream<bf16>(p, stream);
    default: return choose_stream<f16>(p, stream);
  }
}

template <class T, int kQueries>
Status run_tiles(const Tiles& p, int64_t chunks, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.queries.count, kQueries)),
                  static_cast<unsigned>(ceil_div(p.rows.count, kCosineTileRows)),
                  static_cast<unsigned>(chunks));
  return launch(&cosine_tiles<T, kQueries>, grid, dim3(kCosineThreads),
                kStages * CosineTile<T, kQueries>::kStageBytes, stream, p);
}

template <class T>
Status choose_tiles(const Tiles& p, int64_t chunks, void* stream) {
  const int64_t tiles =
      ceil_div(p.queries.count, 128) * ceil_div(p.rows.count, kCosineTileRows) * chunks;
  const bool small = p.queries.count <= 64 || tiles < kFewTiles;
  return small ? run_tiles<T, 64>(p, chunks, stream) : run_tiles<T, 128>(p, chunks, stream);
}

Status tiles(const Tiles& p, DType type, int64_t chunks, void* stream) {
  Status status{};
  switch (type) {
    case DType::f32: status = choose_tiles<float>(p, chunks, stream); break;
    case DType::bf16: status = choose_tiles<bf16>(p, chunks, stream); break;
    default: status = choose_tiles<f16>(p, chunks, stream); break;
  }
  if (!status.ok() || chunks == 1) return status;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.rows.count, kRowThreads)),
                  static_cast<unsigned>(p.queries.count));
  return launch(&cosine_join_chunks, grid, dim3(kRowThreads), 0, stream, p,
                static_cast<int>(chunks));
}

// One batch of queries; keeps what its slabs share.
class Batch {
 public:
  Batch(const CosineCudaCall& call, const Buffers& buffers, int64_t first)
      : call_(call), p_(call.problem), buffers_(buffers), first_(first) {
    type_ = p_.query_dtype == p_.row_dtype ? p_.row_dtype : DType::f32;
    queries_ = operand(p_.query_data, p_.query_stride, p_.query_dtype, type_, first,
                       std::min(p_.queries - first, kBatch), buffers.query_scales);
  }

  Status run() const {
    Status status = norms(queries_, p_.features, buffers_.query_inverses, buffers_.query_scales,
                          call_.stream);
    if (status.ok() && few_queries(p_)) {
      status = pack({queries_, p_.features, buffers_.packed, buffers_.packed_stride}, p_.row_dtype,
                    call_.stream);
    }
    for (int64_t row = 0, count = 0; status.ok() && row < p_.rows; row += count) {
      count = p_.rows <= 2 * kFirstSlab ? p_.rows : row == 0 ? kFirstSlab : kGrowth * row;
      count = std::min({count, buffers_.slab, p_.rows - row});
      status = run_slab(row, count);
    }
    return status;
  }

 private:
  Status run_slab(int64_t row, int64_t count) const {
    ScoreSlab slab{};
    slab.scores = buffers_.scores;
    slab.masks = buffers_.masks;
    slab.stride = buffers_.slab;
    slab.best = buffers_.best;
    slab.k = static_cast<int32_t>(p_.k);
    slab.filter = row >= p_.k;
    slab.first_row = static_cast<uint32_t>(row);
    slab.query_inverses = buffers_.query_inverses;
    slab.row_inverses = buffers_.row_inverses;
    const CosineOperand rows = operand(p_.row_data, p_.row_stride, p_.row_dtype, type_, row, count,
                                       buffers_.row_scales);
    Status status{};
    if (few_queries(p_)) {
      const Stream stream{rows.data, rows.stride, count, p_.features, is_aligned(rows),
                          static_cast<int>(queries_.count), buffers_.packed,
                          buffers_.packed_stride, slab};
      status = stream_rows(stream, rows.dtype, call_.stream);
    } else {
      status = norms(rows, p_.features, buffers_.row_inverses, buffers_.row_scales, call_.stream);
      if (!status.ok()) return status;
      status = tiles({queries_, rows, p_.features, buffers_.chunk, slab}, type_, buffers_.chunks,
                     call_.stream);
    }
    if (!status.ok()) return status;
    Selection select{};
    select.slab = slab;
    select.best = buffers_.best;
    select.seen = static_cast<int32_t>(std::min(p_.k, row));
    select.rows = static_cast<int32_t>(count);
    select.start = p_.start;
    if (row + count == p_.rows) {
      select.out_scores = call_.scores + first_ * p_.k;
      select.out_indices = call_.indices + first_ * p_.k;
    }
    return launch(&cosine_select, dim3(static_cast<unsigned>(queries_.count)), dim3(kSelectThreads),
                  0, call_.stream, select);
  }

  const CosineCudaCall& call_;
  const CosineProblem& p_;
  const Buffers& buffers_;
  int64_t first_;
  DType type_;
  CosineOperand queries_;
};

}  // namespace

int64_t cosine_topk_cuda_workspace(const CosineProblem& problem) {
  return Buffers(problem, nullptr).bytes;
}

Status cosine_topk_cuda(const CosineCudaCall& call) {
  const CosineProblem& p = call.problem;
  if (p.queries == 0 || p.k == 0) return {};
  const Buffers buffers(p, call.workspace);
  for (int64_t query = 0; query < p.queries; query += kBatch) {
    const Status status = Batch(call, buffers, query).run();
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace gradsafe

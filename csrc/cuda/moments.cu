// moments: one read of a list of gradients and their references.
//
// Stage 1 gives every tile of every matrix to one block, which writes partial sums; stage 2 adds
// partials in index order in float64. Tiles have a fixed size, so a result depends neither on the
// number of SMs nor on the other matrices of the list. All metadata travels in kernel arguments:
// nothing is copied to the device, which keeps the call safe under CUDA-graph capture.
#include <algorithm>

#include "../common/tiling.h"
#include "common/find_entry.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "gradsafe/moments.h"

namespace gradsafe {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 2;  // at least; lets the compiler use 128 registers before it spills
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kFlatTile = 65536;  // elements of an unbroken matrix per block
constexpr int64_t kTensorTileRows = 64, kTensorTileCols = 1024;
constexpr int64_t kTileRows = 256;
constexpr int kLoadsInFlight = 8;  // packs a thread asks for before it needs the first
static_assert(kTensorTileRows * kTensorTileCols == kFlatTile, "both bound a thread's chain");

struct Entry {
  MomentsTask task;
  int64_t rows, cols;  // as tiled: an unbroken matrix under Axis::tensor is one long row
  int64_t tile_rows, tile_cols, col_strips, row_blocks;
  int64_t first_tile;   // of this matrix, within the launch
  int64_t row_partial;  // where its partials start; float64 elements for Axis::tensor, else float32
  int64_t col_partial;
  int64_t out;          // where its results start, in float64 elements
  bool aligned;         // every row of every matrix starts on a 16-byte border
};

// Kernel arguments may take 32,764 bytes (CUDA 12.1 and later, compute capability 7.0 and later).
constexpr int kMaxEntries = 150;
struct Batch {
  Entry entries[kMaxEntries];
  void* workspace;
  double* out;
  int64_t tiles;
  int32_t count;
  Axis axis;
  uint32_t mask;  // ANDed to the bits of g in the dot products: drops the sign, or nothing
};
static_assert(sizeof(Batch) <= 32764, "the batch must fit the kernel arguments");

struct TileRange {
  int64_t row_block, col_strip, row_begin, row_end, col_begin, col_end;
};

__device__ inline TileRange range_of(const Entry& e, int64_t tile) {
  TileRange r;
  r.row_block = tile / e.col_strips;
  r.col_strip = tile % e.col_strips;
  r.row_begin = r.row_block * e.tile_rows;
  r.row_end = min(r.row_begin + e.tile_rows, e.rows);
  r.col_begin = r.col_strip * e.tile_cols;
  r.col_end = min(r.col_begin + e.tile_cols, e.cols);
  return r;
}

template <class G, class R, int K, int N>
struct Loaded {
  float g[N];
  float refs[K > 0 ? K : 1][N];

  __device__ void read(const Entry& e, int64_t row, int64_t col, int64_t left) {
    const G* grad = static_cast<const G*>(e.task.grad) + row * e.task.grad_stride + col;
    const bool whole = e.aligned && left >= N;
    if (whole) load_pack(grad, g); else load_first(grad, left, g);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const R* ref = static_cast<const R*>(e.task.refs[k]) + row * e.task.ref_strides[k] + col;
      if (whole) load_pack(ref, refs[k]); else load_first(ref, left, refs[k]);
    }
  }

  // Adds element i to the sums of one slice.
  __device__ void add_to(float (&sums)[2 + K], int i, uint32_t mask) const {
    const float magnitude = __uint_as_float(__float_as_uint(g[i]) & mask);
    sums[0] += g[i];
    sums[1] = fmaf(g[i], g[i], sums[1]);
#pragma unroll
    for (int k = 0; k < K; ++k) sums[2 + k] = fmaf(magnitude, refs[k][i], sums[2 + k]);
  }
};

// ---- Axis::tensor ----------------------------------------------------------------------------
template <class G, class R, int K>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    moments_tensor(const __grid_constant__ Batch batch) {
  constexpr int Q = 2 + K, N = kPackSize<G, R>;
  __shared__ double shared[kWarps * Q];
  const Entry& e = find_entry(batch, blockIdx.x);
  const int64_t tile = blockIdx.x - e.first_tile;
  const TileRange r = range_of(e, tile);
  // Packs are summed first: a thread's float32 chain is then at most 64 steps long, and rounding
  // ties of 16-bit squares, which all go the same way, have no time to add up.
  float sums[Q] = {};
  for (int64_t row = r.row_begin; row < r.row_end; ++row) {
#pragma unroll kLoadsInFlight / (1 + K)
    for (int64_t c = r.col_begin + threadIdx.x * N; c < r.col_end; c += kThreads * N) {
      Loaded<G, R, K, N> at;
      at.read(e, row, c, r.col_end - c);
      float pack[Q] = {};
#pragma unroll
      for (int i = 0; i < N; ++i) at.add_to(pack, i, batch.mask);
#pragma unroll
      for (int q = 0; q < Q; ++q) sums[q] += pack[q];
    }
  }
  double wide[Q];
#pragma unroll
  for (int q = 0; q < Q; ++q) wide[q] = sums[q];
  double* partials = static_cast<double*>(batch.workspace) + e.row_partial;
  block_sum_to(wide, shared, partials + tile * Q);
}

template <int Q>
__global__ void __launch_bounds__(kThreads) finish_tensor(const __grid_constant__ Batch batch) {
  __shared__ double shared[kWarps * Q];
  const Entry& e = batch.entries[blockIdx.x];
  const double* partials = static_cast<const double*>(batch.workspace) + e.row_partial;
  const int64_t tiles = e.row_blocks * e.col_strips;
  double sums[Q] = {};
  for (int64_t tile = threadIdx.x; tile < tiles; tile += kThreads) {
#pragma unroll
    for (int q = 0; q < Q; ++q) sums[q] += partials[tile * Q + q];
  }
  double* out = batch.out + e.out;
  if (threadIdx.x == 0) out[0] = static_cast<double>(e.task.rows * e.task.cols);
  block_sum_to(sums, shared, out + 1);
}

// ---- rows, columns, both ---------------------------------------------------------------------
constexpr int next_power_of_two(int n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}

// A tile is kTileRows rows of 32 * N columns. Lane l of every warp owns columns l * N .. l * N + N,
// warp w owns rows w, w + 8, ...: column sums stay in registers until the tile ends, row sums
// leave the warp at once.
template <class G, class R, int K>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    moments_slices(const __grid_constant__ Batch batch) {
  constexpr int Q = 2 + K, N = kPackSize<G, R>;
  constexpr int kRowsInFlight = K <= 2 ? 2 : 1;  // more references are enough loads by themselves
  constexpr int kPadded = next_power_of_two(Q);
  __shared__ float shared[kWarps][N * kWarp];
  const Entry& e = find_entry(batch, blockIdx.x);
  const TileRange r = range_of(e, blockIdx.x - e.first_tile);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t col = r.col_begin + lane * N;
  const int64_t left = r.col_end - col;
  const bool rows_wanted = has_rows(batch.axis);
  float* partials = static_cast<float*>(batch.workspace);

  float columns[N][Q] = {};
  for (int64_t base = r.row_begin + warp; base < r.row_end; base += kRowsInFlight * kWarps) {
    Loaded<G, R, K, N> at[kRowsInFlight] = {};
#pragma unroll
    for (int p = 0; p < kRowsInFlight; ++p) {
      const int64_t row = base + p * kWarps;
      if (row < r.row_end && left > 0) at[p].read(e, row, col, left);
    }
    float sums[kRowsInFlight * kPadded] = {};
#pragma unroll
    for (int p = 0; p < kRowsInFlight; ++p) {
      float row_sums[Q] = {};
#pragma unroll
      for (int i = 0; i < N; ++i) {
        at[p].add_to(row_sums, i, batch.mask);
        at[p].add_to(columns[i], i, batch.mask);
      }
#pragma unroll
      for (int q = 0; q < Q; ++q) sums[p * kPadded + q] = row_sums[q];
    }
    if (!rows_wanted) continue;
    constexpr int kValues = kRowsInFlight * kPadded, kLanesPerValue = kWarp / kValues;
    const float total = warp_sum_many(sums);
    const int value = lane / kLanesPerValue;
    const int q = value % kPadded;
    const int64_t row = base + (value / kPadded) * kWarps;
    if (lane % kLanesPerValue == 0 && q < Q && row < r.row_end) {
      partials[e.row_partial + (r.col_strip * e.rows + row) * Q + q] = total;
    }
  }
  if (!has_columns(batch.axis)) return;

  // The eight warps' column sums, added in warp order, one quantity after the other.
#pragma unroll
  for (int q = 0; q < Q; ++q) {
#pragma unroll
    for (int i = 0; i < N; ++i) shared[warp][i * kWarp + lane] = columns[i][q];
    __syncthreads();
    const int c = threadIdx.x;
    if (c < N * kWarp && r.col_begin + c < r.col_end) {
      float total = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += shared[w][(c % N) * kWarp + c / N];
      partials[e.col_partial + (r.row_block * Q + q) * e.cols + r.col_begin + c] = total;
    }
    __syncthreads();  // the next quantity reuses `shared`
  }
}

// One thread per result. blockIdx.y is the matrix.
template <int Q>
__global__ void __launch_bounds__(kThreads) finish_slices(const __grid_constant__ Batch batch) {
  const Entry& e = batch.entries[blockIdx.y];
  const float* partials = static_cast<const float*>(batch.workspace);
  const int64_t step = int64_t{gridDim.x} * kThreads;
  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  double* out = batch.out + e.out;
  if (has_rows(batch.axis)) {
    for (int64_t row = first; row < e.rows; row += step) {
      double sums[Q] = {};
      for (int64_t strip = 0; strip < e.col_strips; ++strip) {
        const float* partial = partials + e.row_partial + (strip * e.rows + row) * Q;
#pragma unroll
        for (int q = 0; q < Q; ++q) sums[q] += partial[q];
      }
      out[row] = static_cast<double>(e.cols);
#pragma unroll
      for (int q = 0; q < Q; ++q) out[(1 + q) * e.rows + row] = sums[q];
    }
    out += reported(Q - 2) * e.rows;
  }
  if (has_columns(batch.axis)) {
    for (int64_t i = first; i < Q * e.cols; i += step) {
      double sum = 0;
      for (int64_t block = 0; block < e.row_blocks; ++block) {
        sum += partials[e.col_partial + block * Q * e.cols + i];
      }
      out[e.cols + i] = sum;
      if (i < e.cols) out[i] = static_cast<double>(e.rows);
    }
  }
}

// ---- host ------------------------------------------------------------------------------------
int64_t strip_cols(const MomentsProblem& problem) {
  return kWarp * pack_size(size_of(problem.grad_dtype), size_of(problem.ref_dtype));
}

MomentsTiling tile(const MomentsProblem& problem, const MomentsTask& task) {
  if (problem.axis == Axis::tensor) {
    return tile_matrix(problem, task, kFlatTile, kTensorTileRows, kTensorTileCols);
  }
  return make_tiling(task.rows, task.cols, kTileRows, strip_cols(problem));
}

bool starts_aligned(const void* data, int64_t stride, int64_t rows, int64_t element) {
  return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 &&
         (rows <= 1 || stride * element % kVectorBytes == 0);
}

bool is_aligned(const MomentsProblem& problem, const MomentsTask& task, int64_t rows) {
  bool aligned =
      starts_aligned(task.grad, task.grad_stride, rows, size_of(problem.grad_dtype));
  for (int k = 0; k < problem.num_refs; ++k) {
    aligned = aligned && starts_aligned(task.refs[k], task.ref_strides[k], rows,
                                        size_of(problem.ref_dtype));
  }
  return aligned;
}

struct Partials {
  int64_t rows = 0, cols = 0;  // elements
};

Partials partials_of(const MomentsProblem& problem, const MomentsTiling& t) {
  const int64_t q = accumulated(problem.num_refs);
  Partials size;
  if (problem.axis == Axis::tensor) size.rows = t.tiles() * q;
  if (has_rows(problem.axis)) size.rows = t.col_strips * t.rows * q;
  if (has_columns(problem.axis)) size.cols = t.row_blocks * t.cols * q;
  return size;
}

template <class G, class R, int K>
Status run_batch(const Batch& batch, void* stream) {
  const dim3 block(kThreads), grid(static_cast<unsigned>(batch.tiles));
  if (batch.axis == Axis::tensor) {
    const Status status = launch(&moments_tensor<G, R, K>, grid, block, 0, stream, batch);
    if (!status.ok()) return status;
    return launch(&finish_tensor<2 + K>, dim3(batch.count), block, 0, stream, batch);
  }
  const Status status = launch(&moments_slices<G, R, K>, grid, block, 0, stream, batch);
  if (!status.ok()) return status;
  int64_t results = 1;
  for (int i = 0; i < batch.count; ++i) {
    const Entry& e = batch.entries[i];
    results = std::max({results, e.rows, e.cols * (2 + K)});
  }
  const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(ceil_div(results, kThreads), 1024));
  return launch(&finish_slices<2 + K>, dim3(blocks, batch.count), block, 0, stream, batch);
}

using RunBatch = Status (*)(const Batch&, void*);

template <class G, class R>
RunBatch choose_refs(int num_refs) {
  switch (num_refs) {
    case 1: return &run_batch<G, R, 1>;
    case 2: return &run_batch<G, R, 2>;
    case 3: return &run_batch<G, R, 3>;
    case 4: return &run_batch<G, R, 4>;
    default: return &run_batch<G, G, 0>;  // without references their type is idle
  }
}

template <class G>
RunBatch choose_ref_dtype(const MomentsProblem& problem) {
  switch (problem.ref_dtype) {
    case DType::f32: return choose_refs<G, float>(problem.num_refs);
    case DType::bf16: return choose_refs<G, bf16>(problem.num_refs);
    case DType::f16: return choose_refs<G, f16>(problem.num_refs);
    default: return choose_refs<G, f8>(problem.num_refs);
  }
}

RunBatch choose(const MomentsProblem& problem) {
  switch (problem.grad_dtype) {
    case DType::f32: return choose_ref_dtype<float>(problem);
    case DType::bf16: return choose_ref_dtype<bf16>(problem);
    default: return choose_ref_dtype<f16>(problem);
  }
}

}  // namespace

int64_t moments_cuda_workspace(const MomentsProblem& problem, const MomentsTask* tasks,
                               int64_t num_tasks) {
  int64_t elements = 0;
  for (int64_t i = 0; i < num_tasks; ++i) {
    const Partials size = partials_of(problem, tile(problem, tasks[i]));
    elements += size.rows + size.cols;
  }
  return elements * (problem.axis == Axis::tensor ? 8 : 4);
}

Status moments_cuda(const MomentsCudaCall& call) {
  const RunBatch run = choose(call.problem);
  int64_t partial = 0;
  for (int64_t begin = 0; begin < call.num_tasks; begin += kMaxEntries) {
    Batch batch{};
    batch.workspace = call.workspace;
    batch.out = call.out;
    batch.axis = call.problem.axis;
    batch.mask = call.problem.unsigned_dots ? 0x7fffffffu : 0xffffffffu;
    const int64_t end = std::min<int64_t>(begin + kMaxEntries, call.num_tasks);
    for (int64_t i = begin; i < end; ++i) {
      const MomentsTiling t = tile(call.problem, call.tasks[i]);
      const Partials size = partials_of(call.problem, t);
      Entry& e = batch.entries[batch.count++];
      e.task = call.tasks[i];
      e.rows = t.rows;
      e.cols = t.cols;
      e.tile_rows = t.tile_rows;
      e.tile_cols = t.tile_cols;
      e.col_strips = t.col_strips;
      e.row_blocks = t.row_blocks;
      e.first_tile = batch.tiles;
      e.row_partial = partial;
      e.col_partial = partial + size.rows;
      e.out = call.out_offsets[i];
      e.aligned = is_aligned(call.problem, e.task, t.rows);
      partial += size.rows + size.cols;
      batch.tiles += t.tiles();
    }
    const Status status = run(batch, call.stream);
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace gradsafe

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
constexpr int kWarps = kThreads / kWarp;
// Blocks per SM, at least, and loads of a thread before it needs the first: an SM needs 30 to 40 KB
// on their way to keep its share of HBM busy, and half of the warps compute at any time.
constexpr int kTensorLoads = 8;
template <class R, int K>
constexpr int kTensorBlocksPerSm = K >= 3 || sizeof(R) == 1 ? 2 : 3;  // or registers run out
constexpr int kSlicesBlocksPerSm = 2, kSlicesLoads = 8;
constexpr int kFinishThreads = 1024;  // one block adds all tiles of a matrix
constexpr int64_t kFlatTile = 32768;  // elements of an unbroken matrix per block
constexpr int64_t kTensorTileRows = 16, kTensorTileCols = 2048;
constexpr int64_t kTileRows = 256;
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

// Where a thread reads next in the gradient and its references, in steps of whole packs.
template <class G, class R, int K>
struct Cursor {
  static constexpr int kRefs = K > 0 ? K : 1;
  const G* grad;
  const R* refs[kRefs];
  int64_t grad_step, ref_steps[kRefs];  // elements

  // Steps of `rows` rows and `cols` columns.
  __device__ Cursor(const MomentsTask& task, int64_t row, int64_t col, int64_t rows, int64_t cols) {
    grad = static_cast<const G*>(task.grad) + row * task.grad_stride + col;
    grad_step = rows * task.grad_stride + cols;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      refs[k] = static_cast<const R*>(task.refs[k]) + row * task.ref_strides[k] + col;
      ref_steps[k] = rows * task.ref_strides[k] + cols;
    }
  }

  __device__ void advance() {
    grad += grad_step;
#pragma unroll
    for (int k = 0; k < K; ++k) refs[k] += ref_steps[k];
  }
};

// One pack of every matrix, as it lies in memory.
template <class G, class R, int K, int N>
struct Loaded {
  RawPack<G, N> grad;
  RawPack<R, N> refs[K > 0 ? K : 1];

  template <bool kWhole>
  __device__ void read(const Cursor<G, R, K>& at, int64_t left) {
    grad.template load<kWhole>(at.grad, left);
#pragma unroll
    for (int k = 0; k < K; ++k) refs[k].template load<kWhole>(at.refs[k], left);
  }
};

// Element i of a pack in float32.
template <int K>
struct Terms {
  float g, magnitude, refs[K > 0 ? K : 1];

  template <class G, class R, int N>
  __device__ Terms(const Loaded<G, R, K, N>& from, int i, uint32_t mask) {
    g = from.grad.at(i);
    magnitude = __uint_as_float(__float_as_uint(g) & mask);
#pragma unroll
    for (int k = 0; k < K; ++k) refs[k] = from.refs[k].at(i);
  }

  // Adds the element to the sums of one slice.
  __device__ void add_to(float (&sums)[2 + K]) const {
    sums[0] += g;
    sums[1] = fmaf(g, g, sums[1]);
#pragma unroll
    for (int k = 0; k < K; ++k) sums[2 + k] = fmaf(magnitude, refs[k], sums[2 + k]);
  }
};

// Packs of every matrix that a thread asks for before it needs the first: a power of two, for at
// most `loads` loads of 16 bytes.
template <class G, class R, int K, int N>
constexpr int packs_in_flight(int loads) {
  constexpr int kPackBytes = RawPack<G, N>::kBytes + K * RawPack<R, N>::kBytes;
  int packs = 1;
  while (2 * packs * kPackBytes <= loads * kVectorBytes) packs *= 2;
  return packs;
}

// ---- Axis::tensor ----------------------------------------------------------------------------
// Bytes fill 16-byte loads here: sums take no registers per element.
template <class G, class R>
constexpr int kTensorPack = kVectorBytes / static_cast<int>(sizeof(G) < sizeof(R) ? sizeof(G)
                                                                                  : sizeof(R));

// Adds kPacks packs. Each is summed by itself first: a thread's float32 chain is then at most 32
// steps long, and rounding ties of 16-bit squares, which all go the same way, have no time to add
// up.
template <bool kWhole, int kPacks, class G, class R, int K>
__device__ inline void add_packs(Cursor<G, R, K>& at, int64_t left, uint32_t mask,
                                 float (&sums)[2 + K]) {
  constexpr int N = kTensorPack<G, R>;
  Loaded<G, R, K, N> packs[kPacks];
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    packs[p].template read<kWhole>(at, left);
    at.advance();
  }
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    float pack[2 + K] = {};
#pragma unroll
    for (int i = 0; i < N; ++i) Terms<K>(packs[p], i, mask).add_to(pack);
#pragma unroll
    for (int q = 0; q < 2 + K; ++q) sums[q] += pack[q];
  }
}

// Adds `count` whole packs.
template <class G, class R, int K>
__device__ inline void add_whole(Cursor<G, R, K>& at, int count, uint32_t mask,
                                 float (&sums)[2 + K]) {
  constexpr int kPacks = packs_in_flight<G, R, K, kTensorPack<G, R>>(kTensorLoads);
#pragma unroll 1
  for (; count >= kPacks; count -= kPacks) add_packs<true, kPacks>(at, 0, mask, sums);
  if constexpr (kPacks > 1) {
#pragma unroll 1
    for (; count > 0; --count) add_packs<true, 1>(at, 0, mask, sums);
  }
}

template <class G, class R, int K>
__global__ void __launch_bounds__(kThreads, kTensorBlocksPerSm<R, K>)
    moments_tensor(const __grid_constant__ Batch batch) {
  constexpr int Q = 2 + K, N = kTensorPack<G, R>, kStep = kThreads * N;
  __shared__ double shared[kWarps * Q];
  const Entry& e = find_entry(batch, blockIdx.x);
  const int64_t tile = blockIdx.x - e.first_tile;
  const TileRange r = range_of(e, tile);
  const int64_t col = r.col_begin + threadIdx.x * N;
  const int rows = static_cast<int>(r.row_end - r.row_begin);
  const int left = static_cast<int>(r.col_end - col);  // up to the end of the tile
  const uint32_t mask = batch.mask;
  float sums[Q] = {};
  if (rows == 1) {  // along the row
    Cursor<G, R, K> at(e.task, r.row_begin, col, 0, kStep);
    int done = 0;
    if (e.aligned && left >= N) {
      done = (left - N) / kStep + 1;
      add_whole(at, done, mask, sums);
    }
#pragma unroll 1
    for (int c = done * kStep; c < left; c += kStep) add_packs<false, 1>(at, left - c, mask, sums);
  } else {  // down the rows, one column strip after the other
#pragma unroll 1
    for (int c = 0; c < left; c += kStep) {
      Cursor<G, R, K> at(e.task, r.row_begin, col + c, 1, 0);
      if (e.aligned && left - c >= N) {
        add_whole(at, rows, mask, sums);
      } else {
#pragma unroll 1
        for (int i = 0; i < rows; ++i) add_packs<false, 1>(at, left - c, mask, sums);
      }
    }
  }
  double wide[Q];
#pragma unroll
  for (int q = 0; q < Q; ++q) wide[q] = sums[q];
  double* partials = static_cast<double*>(batch.workspace) + e.row_partial;
  block_sum_to(wide, shared, partials + tile * Q);
}

template <int Q>
__global__ void __launch_bounds__(kFinishThreads)
    finish_tensor(const __grid_constant__ Batch batch) {
  __shared__ double shared[kFinishThreads / kWarp * Q];
  const Entry& e = batch.entries[blockIdx.x];
  const double* partials = static_cast<const double*>(batch.workspace) + e.row_partial;
  const int64_t tiles = e.row_blocks * e.col_strips;
  double sums[Q] = {};
#pragma unroll 4
  for (int64_t tile = threadIdx.x; tile < tiles; tile += kFinishThreads) {
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

// What a warp needs to add its rows of a tile. Lane l owns columns l * N .. l * N + N of all rows;
// row sums leave the warp at once, to `partials`, if they are wanted (else null).
template <class G, class R, int K, int N>
struct WarpRows {
  static constexpr int Q = 2 + K;
  Cursor<G, R, K> at;
  float* partials;  // of the next row
  int left;         // columns from the lane's first to the end of the tile
  uint32_t mask;

  // The next kRows rows, kWarps rows apart.
  template <bool kWhole, int kRows>
  __device__ void add(float (&columns)[N][Q]) {
    Loaded<G, R, K, N> packs[kRows];
#pragma unroll
    for (int p = 0; p < kRows; ++p) {
      packs[p].template read<kWhole>(at, left);
      at.advance();
    }
    constexpr int kPadded = next_power_of_two(Q), kValues = kRows * kPadded;
    float sums[kValues] = {};
#pragma unroll
    for (int p = 0; p < kRows; ++p) {
      float row_sums[Q] = {};
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const Terms<K> terms(packs[p], i, mask);
        terms.add_to(row_sums);
        terms.add_to(columns[i]);
      }
      // Lanes behind the end have read lane 0's columns (kWhole), which count once.
#pragma unroll
      for (int q = 0; q < Q; ++q) sums[p * kPadded + q] = left > 0 ? row_sums[q] : 0.0f;
    }
    if (partials == nullptr) return;
    constexpr int kLanesPerValue = kWarp / kValues;
    const float total = warp_sum_many(sums);
    const int lane = threadIdx.x % kWarp, value = lane / kLanesPerValue, q = value % kPadded;
    if (lane % kLanesPerValue == 0 && q < Q) {
      partials[(value / kPadded) * kWarps * Q + q] = total;
    }
    partials += kRows * kWarps * Q;
  }
};

// A tile is kTileRows rows of 32 * N columns; warp w owns rows w, w + 8, ... Column sums stay in
// registers until the tile ends.
template <class G, class R, int K>
__global__ void __launch_bounds__(kThreads, kSlicesBlocksPerSm)
    moments_slices(const __grid_constant__ Batch batch) {
  constexpr int Q = 2 + K, N = kPackSize<G, R>;
  constexpr int kRows = packs_in_flight<G, R, K, N>(kSlicesLoads);
  __shared__ float shared[kWarps][N * kWarp];
  const Entry& e = find_entry(batch, blockIdx.x);
  const TileRange r = range_of(e, blockIdx.x - e.first_tile);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int left = static_cast<int>(r.col_end - r.col_begin) - lane * N;
  float* const partials = static_cast<float*>(batch.workspace);
  const bool whole = e.aligned && (r.col_end - r.col_begin) % N == 0;
  const int64_t row = r.row_begin + warp;
  const int64_t col = r.col_begin + (whole && left <= 0 ? 0 : lane * N);
  WarpRows<G, R, K, N> rows{Cursor<G, R, K>(e.task, row, col, kWarps, 0), nullptr, left, batch.mask};
  if (has_rows(batch.axis)) {
    rows.partials = partials + e.row_partial + (r.col_strip * e.rows + row) * Q;
  }
  float columns[N][Q] = {};
  int count = static_cast<int>(r.row_end - r.row_begin) - warp + kWarps - 1;  // of rows, * kWarps
  if (whole) {
#pragma unroll 1
    for (; count >= kRows * kWarps; count -= kRows * kWarps) rows.template add<true, kRows>(columns);
    if constexpr (kRows > 1) {
#pragma unroll 1
      for (; count >= kWarps; count -= kWarps) rows.template add<true, 1>(columns);
    }
  } else {
#pragma unroll 1
    for (; count >= kWarps; count -= kWarps) rows.template add<false, 1>(columns);
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
#pragma unroll 4
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
#pragma unroll 8
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

bool is_aligned(const MomentsProblem& problem, const MomentsTask& task, int64_t rows) {
  bool aligned =
      starts_aligned(task.grad, task.grad_stride, size_of(problem.grad_dtype), rows);
  for (int k = 0; k < problem.num_refs; ++k) {
    aligned = aligned && starts_aligned(task.refs[k], task.ref_strides[k],
                                        size_of(problem.ref_dtype), rows);
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
    return launch(&finish_tensor<2 + K>, dim3(batch.count), dim3(kFinishThreads), 0, stream,
                  batch);
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

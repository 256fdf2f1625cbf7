// wgrad_moments: moments of G_b = dy_b^T x_b for every sample b, without storing any G_b.
//
// A block owns one tile of [O, I] of one expert (the only one, without experts). It loads the
// references' tile into shared memory once and walks over the expert's samples: tokens stream
// through a three-stage pipeline that runs on across the borders between samples, the tile of G_b
// grows in registers, and its sums leave as float32 partials.
// Finish kernels add the partials in index order in float64. Which block computes a sample, and
// how many there are, does not enter any result. Metadata travels in kernel arguments: nothing is
// copied to the device, and the call is safe under CUDA-graph capture.
//
// This form takes every dtype, axis and alignment. Tensors of 16-bit x and dy with the axes tensor
// and row go to wgrad_moments_sm90.cu on Hopper. What was expected of both and what was measured:
// docs/performance.md.
#include <algorithm>

#include "common/finish_wgrad.cuh"
#include "common/reduce.cuh"
#include "common/sample_parts.cuh"
#include "common/tile_product.cuh"
#include "common/tile_refs.cuh"
#include "gradsafe/wgrad_moments.h"
#include "wgrad_moments_sm90.h"

namespace gradsafe {
namespace {

constexpr int kThreads = kTileThreads;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlocksPerSm = 2;
constexpr int kMostStages = 3;  // two, where a block may take less shared memory
constexpr int kBandRows = 16;  // row tiles that neighbouring blocks share columns of x over
constexpr int64_t kEnoughBlocks = 512;  // below this, an expert's samples are dealt out to more

// The kernel arguments may take 32,764 bytes; a longer batch takes several launches. A block takes
// one tile of one part of the samples.
struct Batch : SampleParts {
  const void *x, *dy;
  int64_t x_stride, dy_stride;
  const void* refs[kMaxRefs];
  int64_t ref_strides[kMaxRefs];
  int64_t expert_bytes[kMaxRefs];  // between the matrices of two experts
  int64_t outs, ins;  // O and I
  int64_t row_tiles, col_tiles;
  float* row_partials;  // also those of Axis::tensor
  float* col_partials;
  DType ref_dtype;
  Axis axis;
  uint32_t mask;  // ANDed to the bits of g in the dot products: drops the sign, or nothing
  int32_t num_refs;
  int32_t stages;
  bool x_aligned, dy_aligned, refs_direct;
};
static_assert(sizeof(Batch) <= 32764, "the batch must fit the kernel arguments");

// Tiles are chosen so that the references of one take at most 64 KiB: with the stages, two blocks
// then fit the 228 KiB of an SM of compute capability 9.0.
struct TileSize {
  int out, in;
};
constexpr TileSize tile_size(int64_t ref_bytes) {  // of all references of one entry
  if (ref_bytes <= 4) return {128, 128};
  return ref_bytes <= 8 ? TileSize{64, 128} : TileSize{64, 64};
}
constexpr int kernel_refs(int num_refs) { return num_refs == 3 ? 4 : num_refs; }

constexpr int next_power_of_two(int n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}

// T: type of x and dy. S: type in which references are kept, T or float32. K: references, 4 also
// for three. kSlices: Axis::row, column or both.
template <class T, class S, int K, bool kSlices>
struct WgradTile {
  static constexpr TileSize kSize = tile_size(K * static_cast<int64_t>(sizeof(S)));
  static constexpr int kOut = kSize.out, kIn = kSize.in;
  static constexpr int Q = 2 + K, kPadded = next_power_of_two(Q);
  using Product = TileProduct<T, kOut, kIn>;
  using Refs = TileRefs<S, K, kOut, kIn>;
  using RefValues = typename Refs::Values;
  static constexpr int kM = Product::kM, kN = Product::kN;
  static constexpr int kRefBytes = K * Refs::kBytes;
  static constexpr int shared_bytes(int stages) { return kRefBytes + stages * Product::kStageBytes; }
  static_assert(shared_bytes(kMostStages) <= 112 * 1024, "tools/ptxas_budget.py counts on it");
  static_assert(shared_bytes(2) <= 99 * 1024, "compute capability 8.6, 8.9 and 12.0 allow no more");
  static_assert(2 * Q * (kOut + kIn) * 4 <= Product::kStageBytes, "slices pass through a stage");

  const Batch& batch;
  const char* refs;
  int64_t row0, col0, row_tile, col_tile;
  int rows, cols;  // of the tile that exist
  TilePlace<kOut, kIn> place;
  typename Product::Sums sums;

  __device__ WgradTile(const Batch& b, const char* shared, int64_t tile) : batch(b), refs(shared) {
    // Blocks that run at the same time form a compact area of tiles: they share rows of dy and
    // columns of x in L2.
    const int64_t band_tiles = kBandRows * b.col_tiles;
    const int64_t band = tile / band_tiles, within = tile % band_tiles;
    const int64_t height = min(b.row_tiles - band * kBandRows, int64_t{kBandRows});
    row_tile = band * kBandRows + within % height;
    col_tile = within / height;
    row0 = row_tile * kOut;
    col0 = col_tile * kIn;
    rows = clamp_count(b.outs, row0, kOut);
    cols = clamp_count(b.ins, col0, kIn);
  }

  __device__ void load_refs(char* to, int64_t expert) const {
    if constexpr (K > 0) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const char* data = static_cast<const char*>(batch.refs[k]) + expert * batch.expert_bytes[k];
        const TileColumns<S> from{reinterpret_cast<const S*>(data), batch.ref_strides[k], col0,
                                  cols, batch.refs_direct};
        Refs::load(to + k * Refs::kBytes, from, batch.ref_dtype, row0,
                   k < batch.num_refs ? rows : 0);
      }
    }
  }

  __device__ void clear() {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[m][n][e] = 0;
      }
    }
  }

  // Behind the matrix's edge operands are zero, but the other factor may be Inf or NaN.
  __device__ void clear_behind_the_edge() {
    if (rows == kOut && cols == kIn) return;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (place.row(m, e) >= rows || place.col(n, e) >= cols) sums[m][n][e] = 0;
        }
      }
    }
  }

  // Adds element e of fragments (m, n) and (m, n + 1) to the sums of a slice, at v[0 .. Q).
  template <class Values>
  __device__ void add_to(Values& v, int first, int m, int n, int e, const RefValues& r) const {
    const float g = sums[m][n + e / 4][e % 4];
    v[first] += g;
    v[first + 1] = fmaf(g, g, v[first + 1]);
    if constexpr (K > 0) {
      const float magnitude = __uint_as_float(__float_as_uint(g) & batch.mask);
#pragma unroll
      for (int k = 0; k < K; ++k) v[first + 2 + k] = fmaf(magnitude, r[k][e], v[first + 2 + k]);
    }
  }

  // One partial per warp: [sample][quantity][tile][warp]. A float32 chain is at most 32 entries,
  // the kM rows of fragments and five steps over the lanes long.
  __device__ void write_tensor(int64_t sample) const {
    float total[kPadded] = {};
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      float pack[Q] = {};
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        RefValues r;
        Refs::read(refs, m, n, r);
#pragma unroll
        for (int e = 0; e < 8; ++e) add_to(pack, 0, m, n, e, r);
      }
#pragma unroll
      for (int q = 0; q < Q; ++q) total[q] += pack[q];
    }
    const float sum = warp_sum_many(total);
    constexpr int kLanesPerValue = kWarp / kPadded;
    const int lane = threadIdx.x % kWarp, q = lane / kLanesPerValue;
    if (lane % kLanesPerValue != 0 || q >= 2 + batch.num_refs) return;
    const int64_t slots = batch.row_tiles * batch.col_tiles * kWarps;
    const int64_t slot = (row_tile * batch.col_tiles + col_tile) * kWarps + threadIdx.x / kWarp;
    batch.row_partials[(sample * (2 + batch.num_refs) + q) * slots + slot] = sum;
  }

  // [half of the columns][quantity][row of the tile]
  __device__ void stash_rows(float* stash) const {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      float v[2 * kPadded] = {};  // rows g, then rows g + 8
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        RefValues r;
        Refs::read(refs, m, n, r);
#pragma unroll
        for (int e = 0; e < 8; ++e) add_to(v, e / 2 % 2 * kPadded, m, n, e, r);
      }
      group_sum_many<4, 1>(v);
      constexpr int kLeft = 2 * kPadded / 4;
#pragma unroll
      for (int i = 0; i < kLeft; ++i) {
        const int value = place.t * kLeft + i, q = value % kPadded;
        const int row = place.row(m, value / kPadded * 2);
        if (q < Q) stash[(place.warp_col / (kIn / 2) * Q + q) * kOut + row] = v[i];
      }
    }
  }

  // [half of the rows][quantity][column of the tile]
  __device__ void stash_columns(float* stash) const {
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      float v[4 * kPadded] = {};  // columns 2 t and 2 t + 1 of both fragments
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        RefValues r;
        Refs::read(refs, m, n, r);
#pragma unroll
        for (int e = 0; e < 8; ++e) add_to(v, (e / 4 * 2 + e % 2) * kPadded, m, n, e, r);
      }
      group_sum_many<8, 4>(v);
      constexpr int kLeft = 4 * kPadded / 8;
#pragma unroll
      for (int i = 0; i < kLeft; ++i) {
        const int value = place.g * kLeft + i, q = value % kPadded, column = value / kPadded;
        const int col = place.col(n + column / 2, column % 2);
        if (q < Q) stash[(place.warp_row / (kOut / 2) * Q + q) * kIn + col] = v[i];
      }
    }
  }

  // Adds the halves and writes [tile][sample][quantity][slices].
  template <int kCount>
  __device__ void write_slices(const float* stash, float* partials, int64_t tile, int64_t sample,
                               int64_t first, int count, int64_t slices) const {
    const int quantities = 2 + batch.num_refs;
    float* to = partials + (tile * batch.samples + sample) * quantities * slices + first;
    for (int i = threadIdx.x; i < quantities * kCount; i += kThreads) {
      const int q = i / kCount, s = i % kCount;
      if (s < count) to[q * slices + s] = stash[i] + stash[Q * kCount + i];
    }
  }

  // `stage` is the one that was just multiplied; nobody loads into it before the next barrier.
  __device__ void write(int64_t sample, char* stage) {
    clear_behind_the_edge();
    if constexpr (!kSlices) {
      write_tensor(sample);
    } else {
      float* rows_stash = reinterpret_cast<float*>(stage);
      float* cols_stash = rows_stash + 2 * Q * kOut;
      __syncthreads();  // all warps are done with the operands
      if (has_rows(batch.axis)) stash_rows(rows_stash);
      if (has_columns(batch.axis)) stash_columns(cols_stash);
      __syncthreads();
      if (has_rows(batch.axis)) {
        write_slices<kOut>(rows_stash, batch.row_partials, col_tile, sample, row0, rows,
                           batch.outs);
      }
      if (has_columns(batch.axis)) {
        write_slices<kIn>(cols_stash, batch.col_partials, row_tile, sample, col0, cols, batch.ins);
      }
    }
  }
};

// Walks over the tokens of a block's samples, a stage at a time. A sample without tokens has one
// stage of zeros.
struct Cursor {
  int sample, token = 0;
  __device__ void advance(const Batch& batch, int step) {
    token += step;
    if (token < batch.lengths[sample]) return;
    token = 0;
    ++sample;
  }
};

template <class T, class S, int K, bool kSlices>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    wgrad_moments_tile(const __grid_constant__ Batch batch) {
  using Tile = WgradTile<T, S, K, kSlices>;
  using Product = typename Tile::Product;
  constexpr int kStep = Product::kStep;
  GRADSAFE_DYNAMIC_SHARED(char, shared);
  char* const ring = shared + Tile::kRefBytes;
  const int stages = batch.stages;
  const int64_t tiles = batch.row_tiles * batch.col_tiles;
  const int part = static_cast<int>(blockIdx.x / tiles);
  const int first = batch.firsts[part], last = batch.firsts[part + 1];
  Tile tile(batch, shared, blockIdx.x % tiles);
  const Product product(
      {static_cast<const T*>(batch.dy), batch.dy_stride, tile.row0, tile.rows, batch.dy_aligned},
      {static_cast<const T*>(batch.x), batch.x_stride, tile.col0, tile.cols, batch.x_aligned});

  Cursor ahead{first};
  int fill = 0;  // stage that is loaded next
  const auto load_next = [&] {
    if (ahead.sample < last) {
      const int left = batch.lengths[ahead.sample] - ahead.token;
      product.load(ring + fill * Product::kStageBytes,
                   batch.starts[ahead.sample] + ahead.token, min(left, kStep));
      ahead.advance(batch, kStep);
    }
    cp_async_commit();  // empty at the end
    fill = fill == stages - 1 ? 0 : fill + 1;
  };
  tile.load_refs(shared, batch.experts[part]);  // in the first stage's group
#pragma unroll 1
  for (int i = 0; i < stages - 1; ++i) load_next();

  int use = 0;  // stage that is multiplied next
#pragma unroll 1
  for (int sample = first; sample < last; ++sample) {
    tile.clear();
    const int length = batch.lengths[sample];
    char* stage;
    int token = 0;
    do {
      if (stages == kMostStages) cp_async_wait<kMostStages - 2>(); else cp_async_wait<0>();
      __syncthreads();  // the stage has arrived, and the last one is no longer read
      load_next();
      stage = ring + use * Product::kStageBytes;
      Product::multiply(tile.sums, stage, length - token);
      use = use == stages - 1 ? 0 : use + 1;
      token += kStep;
    } while (token < length);
    tile.write(sample, stage);
  }
}

// ---- host ------------------------------------------------------------------------------------
// A reference of another type than x and dy is kept as float32, unless theirs holds its values.
bool kept_like_operands(const WgradProblem& p) {
  return p.ref_dtype == p.dtype || p.ref_dtype == DType::f8;
}

int64_t stored_ref_bytes(const WgradProblem& p) {
  return kernel_refs(p.num_refs) * (kept_like_operands(p) ? size_of(p.dtype) : 4);
}

// How a launch is cut into tiles, and the sizes of its partials in float32 elements.
struct Plan {
  DeviceLimits device;
  bool sm90;  // wgrad_moments_sm90.cu runs it
  int64_t row_tiles, col_tiles, parts, samples, quantities;
  int64_t row_partials = 0, col_partials = 0;

  Plan(const WgradProblem& p, const DeviceLimits& limits)
      : device(limits), sm90(wgrad_sm90_takes(p, limits)) {
    if (sm90) {
      const WgradTiles tiles = wgrad_sm90_tiles(p);
      row_tiles = tiles.rows;
      col_tiles = tiles.cols;
      parts = tiles.parts;
    } else {
      const TileSize size = tile_size(stored_ref_bytes(p));
      const MomentsTiling tiling = make_tiling(p.out_features, p.in_features, size.out, size.in);
      row_tiles = tiling.row_blocks;
      col_tiles = tiling.col_strips;
      parts = kWarps;
    }
    samples = std::min<int64_t>(p.samples, kMaxSamples);
    quantities = accumulated(p.num_refs);
    const int64_t each = samples * quantities;
    if (p.axis == Axis::tensor) row_partials = each * slots();
    if (has_rows(p.axis)) row_partials = each * col_tiles * p.out_features;
    if (has_columns(p.axis)) col_partials = each * row_tiles * p.in_features;
  }
  int64_t slots() const { return row_tiles * col_tiles * parts; }
};

template <class T, class S, int K, bool kSlices>
Status run_tiles(Batch& batch, const DeviceLimits& device, void* stream) {
  using Tile = WgradTile<T, S, K, kSlices>;
  const int64_t blocks = batch.row_tiles * batch.col_tiles * batch.parts;
  batch.stages = Tile::shared_bytes(kMostStages) <= device.shared_bytes ? kMostStages : 2;
  const auto bytes = static_cast<std::size_t>(Tile::shared_bytes(batch.stages));
  return launch(&wgrad_moments_tile<T, S, K, kSlices>, dim3(static_cast<unsigned>(blocks)),
                dim3(kThreads), bytes, stream, batch);
}

template <class T, class S, int K>
Status choose_axis(Batch& batch, const DeviceLimits& device, void* stream) {
  return batch.axis == Axis::tensor ? run_tiles<T, S, K, false>(batch, device, stream)
                                    : run_tiles<T, S, K, true>(batch, device, stream);
}

template <class T, class S>
Status choose_refs(Batch& batch, const DeviceLimits& device, void* stream) {
  switch (kernel_refs(batch.num_refs)) {
    case 1: return choose_axis<T, S, 1>(batch, device, stream);
    case 2: return choose_axis<T, S, 2>(batch, device, stream);
    case 4: return choose_axis<T, S, 4>(batch, device, stream);
    default: return choose_axis<T, T, 0>(batch, device, stream);  // without references their type is idle
  }
}

template <class T>
Status choose_ref_dtype(const WgradProblem& p, Batch& batch, const DeviceLimits& device,
                        void* stream) {
  return kept_like_operands(p) ? choose_refs<T, T>(batch, device, stream)
                               : choose_refs<T, float>(batch, device, stream);
}

Status run(const WgradProblem& p, Batch& batch, const DeviceLimits& device, void* stream) {
  switch (p.dtype) {
    case DType::f32: return choose_refs<float, float>(batch, device, stream);
    case DType::bf16: return choose_ref_dtype<bf16>(p, batch, device, stream);
    default: return choose_ref_dtype<f16>(p, batch, device, stream);
  }
}

Status finish(const WgradProblem& p, const Plan& plan, const Batch& batch, const ResultRows& rows,
              double* out, void* stream) {
  const double outs = static_cast<double>(p.out_features), ins = static_cast<double>(p.in_features);
  const unsigned samples = static_cast<unsigned>(batch.samples);
  if (p.axis == Axis::tensor) {
    return launch(&finish_wgrad_tensor, dim3(samples, static_cast<unsigned>(plan.quantities)),
                  dim3(kFinishThreads), 0, stream, batch.row_partials, plan.slots(), outs * ins,
                  out, rows);
  }
  SliceResults r{};
  r.rows = rows;
  r.quantities = plan.quantities;
  r.out_per_sample = moments_out_size(p.axis, p.num_refs, p.out_features, p.in_features);
  const auto run_one = [&](const float* partials, double* to, int64_t tiles, int64_t slices,
                           double count) {
    r.partials = partials;
    r.out = to;
    r.tiles = tiles;
    r.slices = slices;
    r.count = count;
    const int64_t blocks = std::min<int64_t>(ceil_div(r.quantities * slices, kFinishThreads), 1024);
    return launch(&finish_wgrad_slices, dim3(static_cast<unsigned>(blocks), samples),
                  dim3(kFinishThreads), 0, stream, r);
  };
  if (has_rows(p.axis)) {
    const Status status = run_one(batch.row_partials, out, plan.col_tiles, p.out_features, ins);
    if (!status.ok()) return status;
    out += reported(p.num_refs) * p.out_features;
  }
  if (!has_columns(p.axis)) return {};
  return run_one(batch.col_partials, out, plan.row_tiles, p.in_features, outs);
}

}  // namespace

Status wgrad_moments_cuda_workspace(const WgradProblem& problem, int64_t& bytes) {
  DeviceLimits device;
  const Status status = device_limits(device);
  if (!status.ok()) return status;
  const Plan plan(problem, device);
  bytes = (plan.row_partials + plan.col_partials) * 4;
  return {};
}

Status wgrad_moments_cuda(const WgradCudaCall& call) {
  const WgradProblem& p = call.problem;
  DeviceLimits device;
  Status status = device_limits(device);
  if (!status.ok()) return status;
  const Plan plan(p, device);
  Batch batch{};
  batch.x = p.x;
  batch.dy = p.dy;
  batch.x_stride = p.x_stride;
  batch.dy_stride = p.dy_stride;
  batch.outs = p.out_features;
  batch.ins = p.in_features;
  batch.row_tiles = plan.row_tiles;
  batch.col_tiles = plan.col_tiles;
  batch.row_partials = static_cast<float*>(call.workspace);
  batch.col_partials = batch.row_partials + plan.row_partials;
  batch.ref_dtype = p.ref_dtype;
  batch.axis = p.axis;
  batch.mask = p.unsigned_dots ? 0x7fffffffu : 0xffffffffu;
  batch.num_refs = p.num_refs;
  batch.x_aligned = starts_aligned(p.x, p.x_stride, size_of(p.dtype));
  batch.dy_aligned = starts_aligned(p.dy, p.dy_stride, size_of(p.dtype));
  batch.refs_direct = p.ref_dtype == p.dtype || p.ref_dtype == DType::f32;
  for (int k = 0; k < kMaxRefs; ++k) {
    const int source = k < p.num_refs ? k : 0;  // an idle one is never read
    batch.refs[k] = p.refs[source];
    batch.ref_strides[k] = p.ref_strides[source];
    batch.expert_bytes[k] = p.experts ? p.expert_strides[source] * size_of(p.ref_dtype) : 0;
    batch.refs_direct = batch.refs_direct && batch.expert_bytes[k] % kChunkBytes == 0 &&
                        starts_aligned(batch.refs[k], batch.ref_strides[k], size_of(p.ref_dtype));
  }
  const ExpertGroups groups(p);
  ResultRows rows{};
  for (int64_t begin = 0; begin < p.samples; begin += kMaxSamples) {
    const int64_t count = std::min<int64_t>(p.samples - begin, kMaxSamples);
    take_samples(p, groups.order() + begin, count, plan.row_tiles * plan.col_tiles, kEnoughBlocks,
                 batch, rows);
    status = plan.sm90 ? wgrad_moments_sm90(p, batch, batch.row_partials, device, call.stream)
                       : run(p, batch, device, call.stream);
    if (!status.ok()) return status;
    status = finish(p, plan, batch, rows, call.out, call.stream);
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace gradsafe

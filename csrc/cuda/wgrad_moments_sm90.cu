// wgrad_moments on Hopper (sm_90a), for 16-bit x and dy: the same sums as wgrad_moments.cu.
//
// Two warpgroups of a block multiply: each holds 64 x 128 entries of a tile of G in registers, and
// the references of those entries, as float32, beside them, for all samples of its part. The warps
// of a third warpgroup serve them:
//   warp 0     streams x and dy in slabs of 64 tokens through a ring in shared memory, and the next
//              tile's references, all with the copy engine;
//   warp 1     clears what lies behind the last token of a sample in its last slab;
//   warps 2, 3 add up the sums of the threads of one multiplying warpgroup, sample by sample.
// So the path of a multiplying warpgroup is short: wait, wgmma, five instructions an entry, and two
// stores; while it sums one sample, the other warpgroup multiplies.
//
// Blocks are persistent: with n of them, block i works on units i, i + n, i + 2 n, ... A unit is a
// tile and a part of the samples.
// Every unit writes partials of its own, so the number of blocks does not enter any result.
#include "wgrad_moments_sm90.h"

#include <algorithm>

#include "../common/tiling.h"

#if defined(GRADSAFE_WITHOUT_SM90A)

// No code for 9.0 is wanted.
namespace gradsafe {
bool wgrad_sm90_takes(const WgradProblem&, const DeviceLimits&) { return false; }
WgradTiles wgrad_sm90_tiles(const WgradProblem&) { return {}; }
Status wgrad_moments_sm90(const WgradProblem&, const SampleParts&, float*, const DeviceLimits&,
                          void*) {
  return {StatusCode::no_device_code, 0};
}
}  // namespace gradsafe

#else

#include "common/hopper.cuh"
#include "common/reduce.cuh"
#include "common/sample_parts.cuh"

namespace gradsafe {
namespace {

constexpr int kTile = 128;      // rows and columns of G per block
constexpr int kGroups = 2;      // warpgroups that multiply
constexpr int kGroupRows = 64;  // rows of G of each
constexpr int kGroupThreads = 4 * kWarp;
constexpr int kThreads = (kGroups + 1) * kGroupThreads;
constexpr int kStep = 16;         // tokens of one wgmma
constexpr int kSteps = 4;
constexpr int kSlab = kSteps * kStep;  // tokens of a slot of the ring
constexpr int kBoxCols = 64;      // columns of one copy of x or dy: 128 bytes
constexpr int kRowBytes = 128;    // of every box
constexpr int kBoxBytes = kSlab * kRowBytes;
constexpr int kSlabBytes = 4 * kBoxBytes;  // two boxes of dy, then two of x
constexpr int kMaxSlots = 6;
constexpr int kInFlight = 1;       // slabs that may still be read when the next one is multiplied
constexpr int kMaxRefsHere = 2;    // more do not fit the registers
constexpr int kMultiplyRegisters = 232, kServeRegisters = 40;
constexpr int kQuantities = 4;     // sums of a thread: g, g^2, and one for each reference or zero
constexpr int kBandRows = 16;      // row tiles that neighbouring blocks share columns of x over
constexpr int kAlignment = 1024;   // of a swizzled box
constexpr int kSharedBytes = 227 * 1024;  // what a block may take

struct Batch : SampleParts {
  CUtensorMap x[kSteps], dy[kSteps];  // for boxes of 1 to kSteps times kStep tokens
  CUtensorMap refs[kMaxRefsHere];
  int32_t outs, ins;
  int32_t row_tiles, col_tiles;
  uint32_t slots;
  uint32_t mask;  // ANDed to the bits of g in the dot products: drops the sign, or nothing
  int32_t ref_shift;  // log2 of the bytes of a reference's element
  DType ref_dtype;
  bool by_row;
  float* partials;
};
static_assert(sizeof(Batch) <= 32764, "the batch must fit the kernel arguments");

// ---- what a block works on -------------------------------------------------------------------------
__device__ inline int units_of(const Batch& b) { return b.row_tiles * b.col_tiles * b.parts; }

struct Unit {
  int row_tile, col_tile, expert, first, last;  // samples [first, last)

  // Blocks that run at the same time form a compact area of tiles: they share rows of dy and columns
  // of x in L2.
  __device__ Unit(const Batch& b, int index) {
    const int tiles = b.row_tiles * b.col_tiles;
    const int part = index / tiles, tile = index - part * tiles;
    const int band_tiles = kBandRows * b.col_tiles;
    const int band = tile / band_tiles, within = tile - band * band_tiles;
    const int height = min(b.row_tiles - band * kBandRows, kBandRows);
    col_tile = within / height;
    row_tile = band * kBandRows + within - col_tile * height;
    expert = b.experts[part];
    first = b.firsts[part];
    last = b.firsts[part + 1];
  }
};

// A sample without tokens has one slab, which is cleared.
__device__ inline int slabs_of(int length) { return max((length + kSlab - 1) / kSlab, 1); }
__device__ inline int steps_of(int left) { return min((left + kStep - 1) / kStep, kSteps); }
__device__ inline bool needs_clearing(int length) { return length % kStep != 0 || length == 0; }

// The position in the ring, and the parity of its pass.
struct Ring {
  uint32_t slot = 0, parity = 0;
  __device__ void advance(uint32_t slots) {
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
    }
  }
  __device__ void skip(uint32_t count, uint32_t slots) {
    const uint32_t to = slot + count, passes = to / slots;
    slot = to - passes * slots;
    parity ^= passes & 1;
  }
};

// Addresses in shared memory.
struct Shared {
  uint32_t slabs, refs, sums, barriers;

  __device__ uint32_t slab(uint32_t slot) const { return slabs + slot * kSlabBytes; }
  __device__ uint32_t full(uint32_t slot) const { return barriers + slot * 8; }
  __device__ uint32_t empty(uint32_t slot) const { return full(kMaxSlots + slot); }
  // The last slab of a sample has arrived, but is not cleared yet.
  __device__ uint32_t landed(uint32_t slot) const { return full(2 * kMaxSlots + slot); }
  __device__ uint32_t refs_full(int group) const { return full(3 * kMaxSlots + group); }
  __device__ uint32_t refs_empty(int group) const { return full(3 * kMaxSlots + kGroups + group); }
  __device__ uint32_t sums_full(int group) const { return full(3 * kMaxSlots + 2 * kGroups + group); }
  __device__ uint32_t sums_empty(int group) const { return full(3 * kMaxSlots + 3 * kGroups + group); }
};
constexpr int kBarriers = 3 * kMaxSlots + 4 * kGroups;
constexpr int kSumsBytes = 2 * kGroupThreads * kQuantities * 4;  // of a warpgroup: two rows a thread

// ---- warp 0: copies ------------------------------------------------------------------------------
template <int K>
__device__ inline void load_refs(const Batch& b, const Shared& shared, const Unit& u,
                                 uint32_t parity) {
  const int box_cols = kRowBytes >> b.ref_shift, bytes = kGroupRows * kTile << b.ref_shift;
#pragma unroll 1
  for (int group = 0; group < kGroups; ++group) {
    mbarrier_wait(shared.refs_empty(group), parity ^ 1);
    mbarrier_expect(shared.refs_full(group), K * bytes);
    uint32_t to = shared.refs + group * K * bytes;
#pragma unroll 1
    for (int k = 0; k < K; ++k) {
#pragma unroll 1
      for (int col = 0; col < kTile; col += box_cols, to += kGroupRows * kRowBytes) {
        copy_box(to, &b.refs[k], u.col_tile * kTile + col,
                 u.row_tile * kTile + group * kGroupRows, u.expert, shared.refs_full(group));
      }
    }
  }
}

template <int K>
__device__ inline void produce(const Batch& b, const Shared& shared) {
  Ring ring;
  uint32_t refs_parity = 0;
  for (int i = blockIdx.x; i < units_of(b); i += gridDim.x, refs_parity ^= 1) {
    const Unit u(b, i);
    if constexpr (K > 0) load_refs<K>(b, shared, u, refs_parity);
    const int out = u.row_tile * kTile, in = u.col_tile * kTile;
    for (int s = u.first; s < u.last; ++s) {
      const int length = b.lengths[s];
      int token = b.starts[s], left = max(length, 1);
#pragma unroll 1
      for (; left > 0; left -= kSlab, token += kSlab, ring.advance(b.slots)) {
        mbarrier_wait(shared.empty(ring.slot), ring.parity ^ 1);
        const bool cleared = left < kSlab && needs_clearing(length);
        const uint32_t arrived = cleared ? shared.landed(ring.slot) : shared.full(ring.slot);
        const uint32_t to = shared.slab(ring.slot);
        const int steps = steps_of(left);
        mbarrier_expect(arrived, steps * (kSlabBytes / kSteps));
#pragma unroll
        for (int box = 0; box < 2; ++box) {
          copy_box(to + box * kBoxBytes, &b.dy[steps - 1], out + box * kBoxCols, token, 0, arrived);
          copy_box(to + (2 + box) * kBoxBytes, &b.x[steps - 1], in + box * kBoxCols, token, 0, arrived);
        }
      }
    }
  }
}

// ---- warp 1: tails -------------------------------------------------------------------------------
// Behind a sample's last token lie other tokens, or padding that may hold NaN.
__device__ inline void clear_tails(const Batch& b, const Shared& shared) {
  const int lane = threadIdx.x % kWarp, box = lane / 8, chunk = lane % 8;
  Ring ring;
  uint32_t parities = 0;  // one bit per slot
  for (int i = blockIdx.x; i < units_of(b); i += gridDim.x) {
    const Unit u(b, i);
    for (int s = u.first; s < u.last; ++s) {
      const int length = b.lengths[s], slabs = slabs_of(length);
      ring.skip(slabs - 1, b.slots);
      if (needs_clearing(length)) {
        mbarrier_wait(shared.landed(ring.slot), parities >> ring.slot & 1);
        parities ^= 1u << ring.slot;
        const int left = length - (slabs - 1) * kSlab;
        const uint32_t to = shared.slab(ring.slot) + box * kBoxBytes + chunk * 16;
        for (int row = left; row < max(steps_of(left), 1) * kStep; ++row) {
          store_shared_zeros(to + row * kRowBytes);
        }
        fence_async_proxy();
        __syncwarp();
        if (lane == 0) mbarrier_arrive(shared.full(ring.slot));
      }
      ring.advance(b.slots);
    }
  }
}

// ---- warps 2 and 3: sums ---------------------------------------------------------------------------
__device__ inline float4 plus(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// The four sums of row 8 h + g of fragment row `warp` by lane 4 g + t are number 128 h + 32 warp +
// 4 g + t of a warpgroup's.
template <int Q>
__device__ inline void reduce_sums(const Batch& b, const Shared& shared, const float4* sums,
                                   int group) {
  const int lane = threadIdx.x % kWarp;
  const int64_t tiles = int64_t{b.row_tiles} * b.col_tiles;
  uint32_t parity = 0;
  for (int i = blockIdx.x; i < units_of(b); i += gridDim.x) {
    const Unit u(b, i);
    for (int s = u.first; s < u.last; ++s, parity ^= 1) {
      mbarrier_wait(shared.sums_full(group), parity);
      if (b.by_row) {
        // Partials [column tile][sample][quantity][row].
        float* const to = b.partials + (int64_t{u.col_tile} * b.samples + s) * Q * b.outs;
#pragma unroll 1
        for (int r = lane; r < kGroupRows; r += kWarp) {
          const float4* const from = sums + r % 16 / 8 * kGroupThreads + r / 16 * kWarp + r % 8 * 4;
          float4 total = from[0];
#pragma unroll
          for (int t = 1; t < 4; ++t) total = plus(total, from[t]);
          const int row = u.row_tile * kTile + group * kGroupRows + r;
          if (row < b.outs) {
            to[row] = total.x;
            to[int64_t{b.outs} + row] = total.y;
            if constexpr (Q > 2) to[2 * int64_t{b.outs} + row] = total.z;
            if constexpr (Q > 3) to[3 * int64_t{b.outs} + row] = total.w;
          }
        }
      } else {
        // Partials [sample][quantity][tile][warpgroup].
        float4 total = sums[lane];
#pragma unroll
        for (int j = 1; j < 2 * kGroupThreads / kWarp; ++j) total = plus(total, sums[j * kWarp + lane]);
        float values[kQuantities] = {total.x, total.y, total.z, total.w};
        const float sum = warp_sum_many(values);
        constexpr int kLanesPerValue = kWarp / kQuantities;
        const int q = lane / kLanesPerValue;
        if (lane % kLanesPerValue == 0 && q < Q) {
          const int64_t tile = int64_t{u.row_tile} * b.col_tiles + u.col_tile;
          b.partials[((int64_t{s} * Q + q) * tiles + tile) * kGroups + group] = sum;
        }
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(shared.sums_empty(group));
    }
  }
}

// ---- two warpgroups: products and sums -----------------------------------------------------------
// Reads the references of a thread's entries. They lie in boxes of 64 rows of 128 bytes, 16-byte
// chunk c of row r at c ^ (r % 8).
template <class T, int K>
__device__ inline void read_refs(const Batch& b, const char* shared, float (&refs)[K][64]) {
  const int warp = threadIdx.x % kGroupThreads / kWarp, lane = threadIdx.x % kWarp;
  const int g = lane / 4, t = lane % 4;
  constexpr int kBox = kGroupRows * kRowBytes, kBelow = 8 * kRowBytes;
  shared += (16 * warp + g) * kRowBytes;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const char* from = shared + (k * kBox << b.ref_shift);
    if (b.ref_dtype == DType::f32) {
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        const int at = n / 4 * kBox + ((2 * (n % 4) + t / 2) ^ g) * 16 + t % 2 * 8;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float2 two = *reinterpret_cast<const float2*>(from + h * kBelow + at);
          refs[k][4 * n + 2 * h] = two.x;
          refs[k][4 * n + 2 * h + 1] = two.y;
        }
      }
    } else if (b.ref_dtype == DType::f8) {
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        const int at = (n / 2 ^ g) * 16 + n % 2 * 8 + 2 * t;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint16_t two = *reinterpret_cast<const uint16_t*>(from + h * kBelow + at);
          refs[k][4 * n + 2 * h] = widen(f8{static_cast<uint8_t>(two)});
          refs[k][4 * n + 2 * h + 1] = widen(f8{static_cast<uint8_t>(two >> 8)});
        }
      }
    } else {
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        const int at = n / 8 * kBox + (n % 8 ^ g) * 16 + 4 * t;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t two = *reinterpret_cast<const uint32_t*>(from + h * kBelow + at);
          refs[k][4 * n + 2 * h] = widen(T{static_cast<uint16_t>(two)});
          refs[k][4 * n + 2 * h + 1] = widen(T{static_cast<uint16_t>(two >> 16)});
        }
      }
    }
  }
}

// Behind the matrix's edge operands are zero, but the other factor may be Inf or NaN. `rows` and
// `cols` exist from the thread's first row and column on.
__device__ inline void clear_behind_the_edge(float (&d)[64], int rows, int cols) {
  keep_in_place(rows, cols);
#pragma unroll
  for (int e = 0; e < 64; ++e) {
    if (e / 2 % 2 * 8 >= rows || e / 4 * 8 + e % 2 >= cols) d[e] = 0;
  }
}

template <class T, int K>
__device__ inline void consume(const Batch& b, const Shared& shared, const char* refs_shared,
                               float4* sums_shared, int group) {
  const int thread = threadIdx.x % kGroupThreads, warp = thread / kWarp, lane = thread % kWarp;
  refs_shared += group * K * kGroupRows * kTile << b.ref_shift;
  sums_shared += thread;
  const uint64_t dy = wgmma_operand(shared.slabs + group * kBoxBytes, kBoxBytes, 8 * kRowBytes);
  const uint64_t x = wgmma_operand(shared.slabs + 2 * kBoxBytes, kBoxBytes, 8 * kRowBytes);
  float refs[K > 0 ? K : 1][64];
  float d[64];
  Ring ring, oldest;  // `oldest` is the first slot that is not given back
  uint32_t refs_parity = 0, sums_parity = 0;
  for (int i = blockIdx.x; i < units_of(b); i += gridDim.x, refs_parity ^= 1) {
    const Unit u(b, i);
    // What exists from this thread's first row and column on.
    const int rows =
        b.outs - u.row_tile * kTile - group * kGroupRows - 16 * warp - lane / 4;
    const int cols = b.ins - u.col_tile * kTile - 2 * (lane % 4);
    const bool cut = rows <= 8 || cols < kTile - 6;
    if constexpr (K > 0) {
      mbarrier_wait(shared.refs_full(group), refs_parity);
      read_refs<T, K>(b, refs_shared, refs);
      __syncwarp();
      if (lane == 0) mbarrier_arrive(shared.refs_empty(group));
    }
    for (int s = u.first; s < u.last; ++s, sums_parity ^= 1) {
      const int length = b.lengths[s];
      int left = max(length, 1), in_flight = 0;
#pragma unroll 1
      for (; left > 0; left -= kSlab) {
        mbarrier_wait(shared.full(ring.slot), ring.parity);
        const uint64_t next = ring.slot * (kSlabBytes >> 4);
        const int add = left < length;
        switch (steps_of(left)) {
          case 1: wgmma_m64n128<T, 1>(d, dy + next, x + next, add, kStep * kRowBytes); break;
          case 2: wgmma_m64n128<T, 2>(d, dy + next, x + next, add, kStep * kRowBytes); break;
          case 3: wgmma_m64n128<T, 3>(d, dy + next, x + next, add, kStep * kRowBytes); break;
          default: wgmma_m64n128<T, 4>(d, dy + next, x + next, add, kStep * kRowBytes); break;
        }
        ring.advance(b.slots);
        if (++in_flight > kInFlight) {
          wgmma_wait<kInFlight>();
          if (thread == 0) mbarrier_arrive(shared.empty(oldest.slot));
          oldest.advance(b.slots);
          --in_flight;
        }
      }
      wgmma_wait<0>();
      if (thread < in_flight) {
        Ring mine = oldest;
        mine.skip(thread, b.slots);
        mbarrier_arrive(shared.empty(mine.slot));
      }
      oldest = ring;
      if (cut) clear_behind_the_edge(d, rows, cols);

      // Two rows, and a chain of 32 entries for each.
      float v[2][kQuantities] = {};
#pragma unroll
      for (int e = 0; e < 64; ++e) {
        float (&to)[kQuantities] = v[e / 2 % 2];
        const float magnitude = __uint_as_float(__float_as_uint(d[e]) & b.mask);
        to[0] += d[e];
        to[1] = fmaf(d[e], d[e], to[1]);
#pragma unroll
        for (int k = 0; k < K; ++k) to[2 + k] = fmaf(magnitude, refs[k][e], to[2 + k]);
      }
      mbarrier_wait(shared.sums_empty(group), sums_parity ^ 1);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sums_shared[h * kGroupThreads] = make_float4(v[h][0], v[h][1], v[h][2], v[h][3]);
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(shared.sums_full(group));
    }
  }
}

template <class T, int K>
__global__ void __launch_bounds__(kThreads, 1)
    wgrad_moments_wgmma(const __grid_constant__ Batch batch) {
  GRADSAFE_DYNAMIC_SHARED(char, raw);
  __shared__ uint64_t barriers[kBarriers];
  char* const slabs = raw + (-shared_address(raw) & (kAlignment - 1));
  char* const refs = slabs + batch.slots * kSlabBytes;
  char* const sums = refs + (K * kGroups * kGroupRows * kTile << batch.ref_shift);
  const Shared shared{pinned_shared_address(slabs), pinned_shared_address(refs),
                      pinned_shared_address(sums), pinned_shared_address(barriers)};
  if (threadIdx.x == 0) {
    for (uint32_t slot = 0; slot < batch.slots; ++slot) {
      mbarrier_init(shared.full(slot), 1);
      mbarrier_init(shared.empty(slot), kGroups);
      mbarrier_init(shared.landed(slot), 1);
    }
    for (int group = 0; group < kGroups; ++group) {
      mbarrier_init(shared.refs_full(group), 1);
      mbarrier_init(shared.refs_empty(group), kGroupThreads / kWarp);
      mbarrier_init(shared.sums_full(group), kGroupThreads / kWarp);
      mbarrier_init(shared.sums_empty(group), 1);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  const int role = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x / kGroupThreads), 0);
  if (role < kGroups) {
    take_registers<kMultiplyRegisters>();
    float4* const own = reinterpret_cast<float4*>(sums + role * kSumsBytes);
    consume<T, K>(batch, shared, refs, own, role);
  } else {
    give_registers<kServeRegisters>();
    const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x % kGroupThreads / kWarp), 0);
    if (warp == 0) {
      if (threadIdx.x % kWarp == 0) produce<K>(batch, shared);
    } else if (warp == 1) {
      clear_tails(batch, shared);
    } else {
      const float4* const own = reinterpret_cast<const float4*>(sums + (warp - 2) * kSumsBytes);
      reduce_sums<2 + K>(batch, shared, own, warp - 2);
    }
  }
}

// ---- host ------------------------------------------------------------------------------------
template <class T, int K>
Status run_kernel(Batch& batch, int multiprocessors, void* stream) {
  const int refs = K * kGroups * kGroupRows * kTile << batch.ref_shift;
  const int rest = kAlignment + refs + kGroups * kSumsBytes;
  constexpr int kDynamic = kSharedBytes - kBarriers * 8;
  batch.slots = static_cast<uint32_t>(std::min((kDynamic - rest) / kSlabBytes, kMaxSlots));
  const int64_t units = int64_t{batch.row_tiles} * batch.col_tiles * batch.parts;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(units, multiprocessors)));
  const size_t bytes = static_cast<size_t>(rest) + batch.slots * kSlabBytes;
  return launch(&wgrad_moments_wgmma<T, K>, grid, dim3(kThreads), bytes, stream, batch);
}

template <class T>
Status run(Batch& batch, int num_refs, int multiprocessors, void* stream) {
  switch (num_refs) {
    case 0: return run_kernel<T, 0>(batch, multiprocessors, stream);
    case 1: return run_kernel<T, 1>(batch, multiprocessors, stream);
    default: return run_kernel<T, 2>(batch, multiprocessors, stream);
  }
}

int32_t log2_of(int64_t bytes) { return bytes == 4 ? 2 : bytes == 2 ? 1 : 0; }

bool encode_maps(const WgradProblem& p, Batch& batch) {
  int64_t rows = 1, experts = 1;
  for (int64_t i = 0; i < p.samples; ++i) {
    rows = std::max(rows, p.starts[i] + p.lengths[i]);
    if (p.experts) experts = std::max(experts, p.experts[i] + 1);
  }
  bool done = true;
  for (int steps = 0; steps < kSteps; ++steps) {
    const int box = (steps + 1) * kStep;
    done = done &&
           encode_tensor_map(batch.x[steps], p.x, p.dtype, p.in_features, rows, p.x_stride, 1,
                             p.x_stride, box) &&
           encode_tensor_map(batch.dy[steps], p.dy, p.dtype, p.out_features, rows, p.dy_stride, 1,
                             p.dy_stride, box);
  }
  for (int k = 0; k < p.num_refs; ++k) {
    const int64_t between = p.experts ? p.expert_strides[k] : p.ref_strides[k];
    done = done && encode_tensor_map(batch.refs[k], p.refs[k], p.ref_dtype, p.in_features,
                                     p.out_features, p.ref_strides[k], experts, between,
                                     kGroupRows);
  }
  return done;
}

}  // namespace

bool wgrad_sm90_takes(const WgradProblem& p, const DeviceLimits& device) {
  constexpr int64_t kMost = int64_t{1} << 31;
  const bool refs_fit = p.num_refs == 0 || p.ref_dtype == p.dtype || p.ref_dtype == DType::f32 ||
                        p.ref_dtype == DType::f8;
  bool takes = device.major == 9 && device.minor == 0 && device.shared_bytes >= kSharedBytes &&
               encode_tiled() != nullptr && refs_fit &&
               p.dtype != DType::f32 && p.num_refs <= kMaxRefsHere && !has_columns(p.axis) &&
               p.out_features >= kGroupRows && p.in_features >= kBoxCols &&
               p.out_features < kMost && p.in_features < kMost && p.samples > 0 &&
               starts_aligned(p.x, p.x_stride, 2) && starts_aligned(p.dy, p.dy_stride, 2) &&
               p.x_stride >= p.in_features && p.dy_stride >= p.out_features;
  for (int k = 0; k < p.num_refs; ++k) {
    const int64_t bytes = size_of(p.ref_dtype);
    // A tensor map has no place for rows or matrices that are the same memory, as expand() makes them.
    takes = takes && starts_aligned(p.refs[k], p.ref_strides[k], bytes) &&
            p.ref_strides[k] >= p.in_features &&
            (!p.experts || (p.expert_strides[k] * bytes % kVectorBytes == 0 &&
                            p.expert_strides[k] >= p.ref_strides[k]));
  }
  return takes;
}

WgradTiles wgrad_sm90_tiles(const WgradProblem& p) {
  return {ceil_div(p.out_features, kTile), ceil_div(p.in_features, kTile), kGroups};
}

Status wgrad_moments_sm90(const WgradProblem& p, const SampleParts& parts, float* partials,
                          const DeviceLimits& device, void* stream) {
  Batch batch{};
  static_cast<SampleParts&>(batch) = parts;
  if (!encode_maps(p, batch)) {
    return {StatusCode::cuda_error, static_cast<int32_t>(cudaErrorInvalidValue)};
  }
  const WgradTiles tiles = wgrad_sm90_tiles(p);
  batch.outs = static_cast<int32_t>(p.out_features);
  batch.ins = static_cast<int32_t>(p.in_features);
  batch.row_tiles = static_cast<int32_t>(tiles.rows);
  batch.col_tiles = static_cast<int32_t>(tiles.cols);
  batch.mask = p.unsigned_dots ? 0x7fffffffu : 0xffffffffu;
  batch.ref_dtype = p.ref_dtype;
  batch.ref_shift = log2_of(size_of(p.ref_dtype));
  batch.by_row = p.axis == Axis::row;
  batch.partials = partials;
  return p.dtype == DType::bf16 ? run<bf16>(batch, p.num_refs, device.multiprocessors, stream)
                                : run<f16>(batch, p.num_refs, device.multiprocessors, stream);
}

}  // namespace gradsafe

#endif  // GRADSAFE_WITHOUT_SM90A

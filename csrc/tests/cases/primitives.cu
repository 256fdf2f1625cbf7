// Entries for the shared device code: reductions, matrix fragments, asynchronous copies, shuffles.
// They are ordinary CUDA kernels; nvcc compiles this file too, which checks the inline PTX.
#include "common/async_copy.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"

#if defined(GRADSAFE_EMULATE)
#include "cases.h"
#endif

namespace gradsafe {
namespace {

// ---- reductions: value i of lane l is in[l * M + i]; lane l writes what it is left with ---------
template <int M>
__global__ void sum_many(const float* in, float* out) {
  float values[M];
  for (int i = 0; i < M; ++i) values[i] = in[threadIdx.x * M + i];
  out[threadIdx.x] = warp_sum_many(values);
}

// ---- c[16, 8] += a[16, 16] b[16, 8], once with fragments picked by hand, once with ldmatrix -----
__device__ inline uint32_t two(uint16_t low, uint16_t high) { return low | uint32_t{high} << 16; }

template <class T>
__global__ void product(const uint16_t* a, const uint16_t* b, const float* c, float* by_hand,
                        float* by_ldmatrix) {
  __shared__ __align__(16) uint16_t tile_a[16][16];
  __shared__ __align__(16) uint16_t tile_at[16][16];
  __shared__ __align__(16) uint16_t tile_b[16][8];
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  for (int i = lane; i < 256; i += kWarp) {
    tile_a[i / 16][i % 16] = a[i];
    tile_at[i % 16][i / 16] = a[i];
  }
  for (int i = lane; i < 128; i += kWarp) tile_b[i / 8][i % 8] = b[i];
  __syncwarp();

  float sums[4];
  const auto load_c = [&] {
    for (int i = 0; i < 4; ++i) sums[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  };
  const auto store_c = [&](float* out) {
    for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
  };
  uint32_t fa[4], fb[2];
  for (int i = 0; i < 4; ++i) {
    const int row = g + i % 2 * 8, col = 2 * t + i / 2 * 8;
    fa[i] = two(a[row * 16 + col], a[row * 16 + col + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    const int row = 2 * t + i * 8;
    fb[i] = two(b[row * 8 + g], b[(row + 1) * 8 + g]);
  }
  load_c();
  mma_m16n8k16<T>(sums, fa, fb);
  store_c(by_hand);

  const int matrix = lane / 8, row = lane % 8;
  load_c();
  ldmatrix(fa, &tile_a[matrix % 2 * 8 + row][matrix / 2 * 8]);
  ldmatrix_trans(fb, &tile_b[lane % 16][0]);
  mma_m16n8k16<T>(sums, fa, fb);
  store_c(by_ldmatrix);

  load_c();
  ldmatrix_trans(fa, &tile_at[matrix / 2 * 8 + row][matrix % 2 * 8]);
  mma_m16n8k16<T>(sums, fa, fb);
  store_c(by_ldmatrix + 128);
}

// ---- c[16, 8] += a[16, 8] bt[8, 8]^T in TF32, likewise ------------------------------------------
__global__ void product_tf32(const float* a, const float* bt, const float* c, float* by_hand,
                             float* by_ldmatrix) {
  __shared__ __align__(16) float tile_a[16][8];
  __shared__ __align__(16) float tile_b[8][8];
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  for (int i = lane; i < 128; i += kWarp) tile_a[i / 8][i % 8] = a[i];
  for (int i = lane; i < 64; i += kWarp) tile_b[i / 8][i % 8] = bt[i];
  __syncwarp();
  uint32_t fa[4], fb[2];
  for (int i = 0; i < 4; ++i) fa[i] = __float_as_uint(a[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
  for (int i = 0; i < 2; ++i) fb[i] = __float_as_uint(bt[g * 8 + t + i * 4]);
  const auto multiply = [&](float* out) {
    float sums[4];
    for (int i = 0; i < 4; ++i) sums[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    mma_m16n8k8_tf32(sums, fa, fb);
    for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
  };
  multiply(by_hand);
  const int matrix = lane / 8, row = lane % 8;
  ldmatrix(fa, &tile_a[matrix % 2 * 8 + row][matrix / 2 * 4]);
  ldmatrix(fb, &tile_b[row][matrix % 2 * 4]);
  multiply(by_ldmatrix);
}

// ---- registers of ldmatrix for matrices in[m][8][8]: out[m][lane] -------------------------------
template <int N, bool kTransposed>
__global__ void load_matrices(const uint16_t* in, uint32_t* out) {
  __shared__ __align__(16) uint16_t tile[N * 8][8];
  for (int i = threadIdx.x; i < N * 64; i += kWarp) tile[i / 8][i % 8] = in[i];
  __syncwarp();
  uint32_t r[N];
  const void* row = &tile[threadIdx.x % (8 * N)][0];
  if (kTransposed) ldmatrix_trans(r, row); else ldmatrix(r, row);
  for (int m = 0; m < N; ++m) out[m * kWarp + threadIdx.x] = r[m];
}

// ---- a two-stage pipeline: every block doubles `tiles` tiles of 4 floats per thread -------------
// Only the first `count` floats of `in` exist. `stages_ahead` is 1; 2 reads a tile still in flight.
template <int kStagesAhead>
__global__ void pipeline(const float* in, float* out, int count, int tiles) {
  GRADSAFE_DYNAMIC_SHARED(float4, stage);
  const auto start = [&](int tile) {
    const int first = (tile * blockDim.x + threadIdx.x) * 4;
    const int left = tile < tiles ? min(max(count - first, 0), 4) : 0;
    cp_async16(&stage[tile % 2 * blockDim.x + threadIdx.x], left > 0 ? in + first : in, left * 4);
    cp_async_commit();
  };
  start(0);
  for (int tile = 0; tile < tiles; ++tile) {
    start(tile + 1);
    cp_async_wait<kStagesAhead>();
    __syncthreads();
    // A neighbour's element: needs the barrier, not only the wait.
    const int from = (threadIdx.x + 1) % blockDim.x;
    const float4 v = stage[tile % 2 * blockDim.x + from];
    float* to = out + (tile * blockDim.x + from) * 4;
    to[0] = 2 * v.x, to[1] = 2 * v.y, to[2] = 2 * v.z, to[3] = 2 * v.w;
    __syncthreads();
  }
}

// ---- shuffles and votes -------------------------------------------------------------------------
__global__ void exchanges(const int* in, int* out) {
  const int lane = threadIdx.x, v = in[lane];
  out[lane] = __shfl_sync(kAllLanes, v, 5);
  out[32 + lane] = __shfl_sync(kAllLanes, v, lane + 3, 8);
  out[64 + lane] = __shfl_up_sync(kAllLanes, v, 3, 16);
  out[96 + lane] = __shfl_down_sync(kAllLanes, v, 5);
  out[128 + lane] = __shfl_xor_sync(kAllLanes, v, 9);
  out[160 + lane] = static_cast<int>(__ballot_sync(kAllLanes, v % 3 == 0));
  if (lane < 12) {
    out[192 + lane] = __any_sync(0xfffu, v == 7) + 2 * __all_sync(0xfffu, v >= 0);
  } else {
    out[192 + lane] = __shfl_xor_sync(0xfffff000u, v, 1);
  }
}

// ---- the last block to finish adds the partial results of all blocks ----------------------------
__global__ void last_block_sums(const float* in, float* partials, float* out, unsigned* ticket) {
  __shared__ unsigned place;
  if (threadIdx.x < 4) partials[blockIdx.x * 4 + threadIdx.x] = in[blockIdx.x * 4 + threadIdx.x];
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) place = atomicInc(ticket, gridDim.x - 1);
  __syncthreads();
  if (place != gridDim.x - 1 || threadIdx.x != 0) return;
  float sum = 0;
  for (unsigned i = 0; i < gridDim.x * 4; ++i) sum += __ldcg(partials + i);
  *out = sum;
}

#if !defined(GRADSAFE_EMULATE)
// Instantiations for nvcc.
[[maybe_unused]] const void* const used[] = {
    (const void*)&sum_many<1>, (const void*)&sum_many<32>, (const void*)&product<bf16>,
    (const void*)&product<f16>, (const void*)&load_matrices<1, false>,
    (const void*)&load_matrices<1, true>, (const void*)&load_matrices<2, false>,
    (const void*)&load_matrices<4, true>, (const void*)&pipeline<1>, (const void*)&exchanges,
    (const void*)&last_block_sums};
#else

using emulated::Case;
using emulated::Entry;

template <class T>
const T* in(Case& c) { return static_cast<const T*>(c.input()); }
template <class T>
T* out(Case& c, int64_t count) { return static_cast<T*>(c.output(count * sizeof(T))); }

template <int M>
Status run_sum_many(Case& c) {
  const float* values = in<float>(c);
  return launch(&sum_many<M>, dim3(1), dim3(kWarp), 0, nullptr, values, out<float>(c, kWarp));
}
const Entry sums[] = {{"sum_many_1", &run_sum_many<1>},   {"sum_many_2", &run_sum_many<2>},
                      {"sum_many_4", &run_sum_many<4>},   {"sum_many_8", &run_sum_many<8>},
                      {"sum_many_16", &run_sum_many<16>}, {"sum_many_32", &run_sum_many<32>}};

template <class T>
Status run_product(Case& c) {
  const uint16_t* a = in<uint16_t>(c);
  const uint16_t* b = in<uint16_t>(c);
  const float* sums = in<float>(c);
  float* by_hand = out<float>(c, 128);
  return launch(&product<T>, dim3(1), dim3(kWarp), 0, nullptr, a, b, sums, by_hand,
                out<float>(c, 256));
}
Status run_product_tf32(Case& c) {
  const float *a = in<float>(c), *bt = in<float>(c), *sums = in<float>(c);
  float* by_hand = out<float>(c, 128);
  return launch(&product_tf32, dim3(1), dim3(kWarp), 0, nullptr, a, bt, sums, by_hand,
                out<float>(c, 128));
}
const Entry tf32("product_tf32", &run_product_tf32);
const Entry products[] = {{"product_bf16", &run_product<bf16>}, {"product_f16", &run_product<f16>}};

template <int N, bool kTransposed>
Status run_load_matrices(Case& c) {
  const uint16_t* matrices = in<uint16_t>(c);
  return launch(&load_matrices<N, kTransposed>, dim3(1), dim3(kWarp), 0, nullptr, matrices,
                out<uint32_t>(c, N * kWarp));
}
const Entry loads[] = {
    {"ldmatrix_1", &run_load_matrices<1, false>}, {"ldmatrix_trans_1", &run_load_matrices<1, true>},
    {"ldmatrix_2", &run_load_matrices<2, false>}, {"ldmatrix_trans_2", &run_load_matrices<2, true>},
    {"ldmatrix_4", &run_load_matrices<4, false>},
    {"ldmatrix_trans_4", &run_load_matrices<4, true>}};

// Integers: floats of the input, tiles, threads.
template <int kStagesAhead>
Status run_pipeline(Case& c) {
  const float* values = in<float>(c);
  const int count = static_cast<int>(c.integer()), tiles = static_cast<int>(c.integer());
  const int threads = static_cast<int>(c.integer());
  return launch(&pipeline<kStagesAhead>, dim3(1), dim3(threads), 2 * threads * sizeof(float4),
                nullptr, values, out<float>(c, int64_t{4} * threads * tiles), count, tiles);
}
const Entry pipelines[] = {{"pipeline", &run_pipeline<1>}, {"hasty_pipeline", &run_pipeline<2>}};

Status run_exchanges(Case& c) {
  const int* values = in<int>(c);
  return launch(&exchanges, dim3(1), dim3(kWarp), 0, nullptr, values, out<int>(c, 7 * kWarp));
}
const Entry exchange("exchanges", &run_exchanges);

// Integer: blocks. Buffers: 4 floats per block; the ticket, zero.
Status run_last_block(Case& c) {
  const unsigned blocks = static_cast<unsigned>(c.integer());
  const float* values = in<float>(c);
  unsigned* ticket = static_cast<unsigned*>(c.inout());
  float* partials = static_cast<float*>(c.workspace(blocks * 16));
  return launch(&last_block_sums, dim3(blocks), dim3(64), 0, nullptr, values, partials,
                out<float>(c, 1), ticket);
}
const Entry last_block("last_block_sums", &run_last_block);

#endif  // GRADSAFE_EMULATE

}  // namespace
}  // namespace gradsafe

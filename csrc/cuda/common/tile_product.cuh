// dy^T x of one output tile: operands through staged shared memory, sums in a block's registers.
//
// A block of four warps holds a tile of kOut x kIn float32 sums, each warp one quarter of it in
// fragments of 16 x 8. With g = lane / 4 and t = lane % 4, element e of fragment (m, n) of a lane
// lies at row 16 m + 8 (e / 2) + g and column 8 n + 2 t + e % 2 of the warp's quarter. That is the
// layout of c in mma.cuh, for every element type: 16-bit operands meet in the tensor cores, float32
// operands in plain fused multiply-adds, because TF32 would round them to 11 bits.
#pragma once

#include "mma.cuh"
#include "tile_loads.cuh"

namespace gradsafe {

// Where a lane's fragments lie within the tile.
template <int kOut, int kIn>
struct TilePlace {
  static constexpr int kM = kOut / 32, kN = kIn / 16;  // fragments of a warp
  int warp_row, warp_col, g, t;                         // warp_row and warp_col in elements

  __device__ TilePlace() {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    warp_row = warp / 2 * (kOut / 2);
    warp_col = warp % 2 * (kIn / 2);
    g = lane / 4;
    t = lane % 4;
  }
  __device__ int row(int m, int e) const { return warp_row + 16 * m + e / 2 * 8 + g; }
  __device__ int col(int n, int e) const { return warp_col + 8 * n + 2 * t + e % 2; }
};

template <class T, int kOut, int kIn>
struct TileProduct {
  static constexpr int kStep = 64 / sizeof(T);  // tokens of a stage: 32, or 16 of float32
  static constexpr int kM = TilePlace<kOut, kIn>::kM, kN = TilePlace<kOut, kIn>::kN;
  using Sums = float[kM][kN][4];
  // An ldmatrix reads one chunk of eight rows; float32 is read row by row.
  using Mixed = std::conditional_t<sizeof(T) == 2, Mix<8, 1>, Mix<1, 0>>;
  using DyLoads = TileLoads<T, kStep, kOut, Mixed>;
  using XLoads = TileLoads<T, kStep, kIn, Mixed>;
  static constexpr int kStageBytes = DyLoads::kBytes + XLoads::kBytes;

  TileColumns<T> dy, x;
  DyLoads dy_loads;
  XLoads x_loads;

  __device__ TileProduct(const TileColumns<T>& dy_, const TileColumns<T>& x_)
      : dy(dy_), x(x_), dy_loads(dy_.count), x_loads(x_.count) {}

  // Starts to load `tokens` rows (at most kStep count) from row `first` on into a stage.
  __device__ void load(char* stage, int64_t first, int tokens) const {
    load_one(stage, dy_loads, dy, first, tokens);
    load_one(stage + DyLoads::kBytes, x_loads, x, first, tokens);
  }

  // Adds the products of the first `tokens` rows of a stage.
  __device__ static void multiply(Sums& sums, const char* stage, int tokens) {
    if constexpr (sizeof(T) == 2) {
      multiply_halves(sums, stage, tokens);
    } else {
      multiply_floats(sums, stage, min(tokens, kStep));
    }
  }

 private:
  template <class Loads>
  __device__ static void load_one(char* to, const Loads& loads, const TileColumns<T>& from,
                                  int64_t first, int tokens) {
    if (from.aligned) {
      loads.start(to, from, first, tokens);
    } else {
      loads.copy(to, tokens, [&](int token, int col) {
        return from.data[(first + token) * from.stride + from.first + col];
      });
    }
  }

  // Both operands are stored by tokens, so both arrive through transposing loads: dy as `a` stored
  // transposed, x as `b` stored by rows (see ldmatrix_trans).
  __device__ static void multiply_halves(Sums& sums, const char* stage, int tokens) {
    const TilePlace<kOut, kIn> place;
    const int lane = threadIdx.x % kWarp, row = lane % 8, quarter = lane / 8;
    const char* dy = stage + (quarter / 2 * 8 + row) * (kOut * 2);
    const char* x = stage + DyLoads::kBytes + (quarter % 2 * 8 + row) * (kIn * 2);
    const int dy_chunk = (place.warp_row / 8 + quarter % 2) ^ Mixed::of(row);
    const int x_chunk = (place.warp_col / 8 + quarter / 2) ^ Mixed::of(row);
#pragma unroll
    for (int k = 0; k < kStep; k += 16) {
      if (k > 0 && k >= tokens) break;  // nothing but zeros from here on
      uint32_t a[kM][4], b[kN / 2][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        ldmatrix_trans(a[m], dy + k * (kOut * 2) + (dy_chunk ^ 2 * m) * kChunkBytes);
      }
#pragma unroll
      for (int n = 0; n < kN / 2; ++n) {
        ldmatrix_trans(b[n], x + k * (kIn * 2) + (x_chunk ^ 2 * n) * kChunkBytes);
      }
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const uint32_t half[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
#pragma unroll
        for (int m = 0; m < kM; ++m) mma_m16n8k16<T>(sums[m][n], a[m], half);
      }
    }
  }

  __device__ static void multiply_floats(Sums& sums, const char* stage, int tokens) {
    const TilePlace<kOut, kIn> place;
    const float* dy = reinterpret_cast<const float*>(stage) + place.row(0, 0);
    const float* x = reinterpret_cast<const float*>(stage + DyLoads::kBytes) + place.col(0, 0);
#pragma unroll 1
    for (int token = 0; token < tokens; ++token, dy += kOut, x += kIn) {
      float a[kM][2];
      float2 b[kN];
#pragma unroll
      for (int m = 0; m < kM; ++m) a[m][0] = dy[16 * m], a[m][1] = dy[16 * m + 8];
#pragma unroll
      for (int n = 0; n < kN; ++n) b[n] = *reinterpret_cast<const float2*>(x + 8 * n);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            sums[m][n][e] = fmaf(a[m][e / 2], e % 2 ? b[n].y : b[n].x, sums[m][n][e]);
          }
        }
      }
    }
  }
};

}  // namespace gradsafe

// Loads of a tile of a matrix into shared memory by a block of 128 threads, 16 bytes at a time.
#pragma once

#include "async_copy.cuh"
#include "reduce.cuh"
#include "vec.cuh"

namespace gradsafe {

constexpr int kTileThreads = 4 * kWarp;
constexpr int kChunkBytes = 16;  // what one cp.async moves, and a lane's row in ldmatrix

// Chunk c of a row lies at place c ^ mix(row) of it. Without, the rows of a tile would start in one
// bank, and reads of a column would wait for each other. The pattern repeats after kPeriod rows.
template <int kPeriod_, int kFactor>
struct Mix {
  static constexpr int kPeriod = kPeriod_;
  __device__ static int of(int row) { return row % kPeriod * kFactor; }
};

// Elements that exist from `first` on, at most `most`.
__device__ inline int clamp_count(int64_t total, int64_t first, int most) {
  return static_cast<int>(max(min(total - first, static_cast<int64_t>(most)), int64_t{0}));
}

// A matrix, and which of its columns belong to the tile.
template <class T>
struct TileColumns {
  const T* data;
  int64_t stride;
  int64_t first;
  int count;     // that exist; the rest of the tile becomes zeros
  bool aligned;  // every row starts on a 16-byte border
};

// A thread's share of a tile of kRows x kCols elements: the same chunk of every kRowStep-th row.
// What is not there becomes zero, in rows and columns: stale bytes could be NaN, and NaN times zero
// is not zero.
template <class T, int kRows, int kCols, class Mixed>
class TileLoads {
 public:
  static constexpr int kBytes = kRows * kCols * static_cast<int>(sizeof(T));

  __device__ explicit TileLoads(int columns) {
    const int chunk = threadIdx.x % kChunks;
    row_ = threadIdx.x / kChunks;
    col_ = chunk * kCount;
    valid_ = clamp_count(columns, col_, kCount);
    shared_ = row_ * kRowBytes + (chunk ^ Mixed::of(row_)) * kChunkBytes;
  }

  // Starts asynchronous copies of `rows` rows from row `first` on. Needs from.aligned.
  __device__ void start(char* to, const TileColumns<T>& from, int64_t first, int rows) const {
    // As integers: addresses of what is not there are computed, too, though never read.
    const uint64_t data = reinterpret_cast<uint64_t>(from.data);
    const int64_t column = from.first + (valid_ > 0 ? col_ : 0);
    uint64_t source = data + ((first + row_) * from.stride + column) * sizeof(T);
    const uint64_t step = kRowStep * from.stride * sizeof(T);
    const int bytes = valid_ * static_cast<int>(sizeof(T));
    to += shared_;
    if (rows >= kRows) {  // the usual case: the instructions of the test are worth saving
#pragma unroll 8
      for (int i = 0; i < kRows / kRowStep; ++i, source += step) {
        cp_async16(to + i * (kRowStep * kRowBytes), reinterpret_cast<const void*>(source), bytes);
      }
    } else {
#pragma unroll 4
      for (int i = 0; i < kRows / kRowStep; ++i, source += step) {
        const bool exists = row_ + i * kRowStep < rows;
        cp_async16(to + i * (kRowStep * kRowBytes),
                   reinterpret_cast<const void*>(exists ? source : data), exists ? bytes : 0);
      }
    }
  }

  // The same at once and element by element, from any address: read(row, column of the tile).
  template <class Read>
  __device__ void copy(char* to, int rows, Read read) const {
#pragma unroll 1
    for (int row = row_; row < kRows; row += kRowStep) {
      const int valid = row < rows ? valid_ : 0;
      Pack<T, kCount> pack;
#pragma unroll
      for (int i = 0; i < kCount; ++i) pack.v[i] = i < valid ? read(row, col_ + i) : T{};
      *reinterpret_cast<Pack<T, kCount>*>(to + shared_ + (row - row_) * kRowBytes) = pack;
    }
  }

 private:
  static constexpr int kCount = kChunkBytes / sizeof(T), kChunks = kCols / kCount;
  static constexpr int kRowStep = kTileThreads / kChunks;
  static constexpr int kRowBytes = kCols * static_cast<int>(sizeof(T));
  static_assert(kTileThreads % kChunks == 0 && kRows % kRowStep == 0, "equal shares");
  static_assert(kRowStep % Mixed::kPeriod == 0, "a thread's rows are mixed alike");

  int row_, col_, valid_, shared_;
};

}  // namespace gradsafe

// The k best of a query's list and its new candidates.
#pragma once

#include "cosine_scores.cuh"

namespace gradsafe {

constexpr int kSelectThreads = 256;
constexpr int kSortKeys = 2048;  // that are sorted at once
constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits;

struct Selection {
  ScoreSlab slab;
  uint64_t* best;  // [queries][k], best first: slab.best, to be replaced
  int32_t seen;    // keys that `best` holds: min(k, rows before the slab)
  int32_t rows;    // of the slab
  float* out_scores;  // [queries][k] for the last slab, else null
  int64_t* out_indices;
  int64_t start;
};

// Candidates of one query: the best so far, and the scores of the slab whose bits are set.
class Candidates {
 public:
  __device__ Candidates(const Selection& p, int64_t query)
      : best_(p.best + query * p.slab.k),
        scores_(p.slab.scores + query * p.slab.stride),
        masks_(p.slab.masks + query * (p.slab.stride / kMaskBits)),
        seen_(p.seen),
        words_((p.rows + kMaskBits - 1) / kMaskBits),
        first_row_(p.slab.first_row) {}

  // This thread's share of their number.
  __device__ int count() const {
    int count = 0;
    for (int i = threadIdx.x; i < seen_; i += kSelectThreads) ++count;
    for (int i = threadIdx.x; i < words_; i += kSelectThreads) count += __popc(masks_[i]);
    return count;
  }

  // Calls visit(key) once for every candidate, in some thread of the block.
  template <class Visit>
  __device__ void visit(Visit visit) const {
    constexpr int kAtOnce = 4, kWarps = kSelectThreads / kWarp;
    for (int i = threadIdx.x; i < seen_; i += kSelectThreads) visit(best_[i]);
    // A warp reads up to 32 words, then the scores of one word after the other, a lane a score.
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int share = min(kWarp, (words_ + kWarps - 1) / kWarps);
    for (int base = warp * share; base < words_; base += kWarps * share) {
      const uint32_t own = lane < share && base + lane < words_ ? masks_[base + lane] : 0;
      unsigned left = __ballot_sync(kAllLanes, own != 0);
      while (left != 0) {
        float scores[kAtOnce];
        int rows[kAtOnce];
        bool set[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int word = left != 0 ? __ffs(static_cast<int>(left)) - 1 : 0;
          const uint32_t bits = __shfl_sync(kAllLanes, own, word);
          set[i] = left != 0 && (bits >> lane & 1u) != 0;
          rows[i] = (base + word) * kMaskBits + lane;
          scores[i] = set[i] ? scores_[rows[i]] : 0.0f;
          left &= left - 1;
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (set[i]) {
            visit(topk_key(__float_as_uint(scores[i]), first_row_ + static_cast<uint32_t>(rows[i])));
          }
        }
      }
    }
  }

 private:
  const uint64_t* best_;
  const float* scores_;
  const uint32_t* masks_;
  int seen_, words_;
  uint32_t first_row_;
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
  // Each lane starts elsewhere, so that no two meet in a bank.
#pragma unroll 4
  for (int i = 0; i < kEach; ++i) own += counts[lane * kEach + (i + lane) % kEach];
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

// One block per query. While more candidates are left than can be sorted, a radix selection finds
// the digits of the k-th largest key from the highest on; keys all differ.
__global__ void __launch_bounds__(kSelectThreads)
    cosine_select(const __grid_constant__ Selection p) {
  __shared__ int counts[kDigits];
  __shared__ Digit digit;
  __shared__ int total, taken;
  __shared__ uint64_t keys[kSortKeys];
  const Candidates candidates(p, blockIdx.x);
  const int k = p.slab.k;
  if (threadIdx.x == 0) total = taken = 0;
  __syncthreads();
  atomicAdd(&total, candidates.count());
  __syncthreads();
  int left = total;
  const int kept = min(k, left);

  uint64_t smallest = 0;
  int wanted = kept;
  for (int above = 64; left > kSortKeys && above > 0;) {
    const int shift = max(above - kDigitBits, 0);
    for (int i = threadIdx.x; i < kDigits; i += kSelectThreads) counts[i] = 0;
    __syncthreads();
    candidates.visit([&](uint64_t key) {
      // Of the digits above, all agree. A shift by 64 is undefined.
      if (above < 64 && ((key ^ smallest) >> above) != 0) return;
      atomicAdd(&counts[key >> shift & (kDigits - 1)], 1);
    });
    __syncthreads();
    if (threadIdx.x < kWarp) {
      const Digit found = find_digit(counts, wanted);
      if (threadIdx.x == 0) digit = found;
    }
    __syncthreads();
    smallest |= static_cast<uint64_t>(digit.value) << shift;
    wanted = digit.wanted;
    left = kept - wanted + digit.count;
    above = shift;
  }

  int size = 1;
  while (size < left) size *= 2;
  for (int i = left + threadIdx.x; i < size; i += kSelectThreads) keys[i] = 0;
  candidates.visit([&](uint64_t key) {
    if (key >= smallest) keys[atomicAdd(&taken, 1)] = key;
  });
  __syncthreads();  // also: nobody reads the list any more
  sort_keys(keys, size);
  for (int i = threadIdx.x; i < kept; i += kSelectThreads) {
    const int64_t at = int64_t{blockIdx.x} * k + i;
    if (p.out_scores == nullptr) {
      p.best[at] = keys[i];
    } else {
      p.out_scores[at] = __uint_as_float(key_score_bits(keys[i]));
      p.out_indices[at] = p.start + key_row(keys[i]);
    }
  }
}

}  // namespace gradsafe

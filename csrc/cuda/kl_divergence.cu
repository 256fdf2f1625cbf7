// kl_divergence: one block per row of logits, and one read of the row from HBM.
//
// Pass 1 finds maxima and sums together: every thread keeps sums relative to a reference near the
// largest logits it has met, and moves them when a much larger one comes. The block brings them to
// common references and adds them in a fixed order in float64. Pass 2 writes the gradient.
//
// A row is a sequence of chunks, in which every thread owns one pack of either side; which columns it
// owns depends on the dtypes and the vocabulary only, so a result depends neither on alignment nor
// on the device. Rows on 16-byte borders (kl_ring) pass through a ring of chunks in shared memory,
// filled by cp.async; a thread reads back only what it copied itself. Pass 1 frees the first chunks
// of a long row and keeps the rest; pass 2 takes the kept ones first, meanwhile loads the others
// again, and as its chunks become free, the next row moves in behind. Other rows (kl_rows) are read
// twice.
#include <algorithm>

#include "../common/kl_value.h"
#include "common/async_copy.cuh"
#include "common/device.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "gradsafe/kl_divergence.h"

namespace gradsafe {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlocksPerSm = 2;  // of kl_rows
constexpr int64_t kMaxBlocks = 16384;  // of kl_rows; further rows are taken in turns
// Chunks of a ring: the most of these that the device's shared memory holds.
constexpr int kRings = 4;
constexpr int ring_size(int index) {
  constexpr int kSizes[kRings] = {14, 9, 6, 4};
  return kSizes[index];
}
// Chunks of a row that a ring does not keep for pass 2: room for loads while the block adds its sums.
constexpr int kRoom = 2;

struct Call {
  KlProblem problem;
  int32_t ring;  // chunks
};

// Exponentials relative to a reference. Of 16-bit logits by the hardware's power of 2, within 2 ulp,
// what underflows being 0; references are then in units of log 2, so that one fused operation gives
// the exponent. (Logits below -2.3e38 count as -inf there.)
template <bool kFast>
struct Exponential {
  static constexpr double kUnit = kFast ? 0.69314718055994531 : 1.0;
  static constexpr float kLog2E = 1.44269504f;
  // References may lie so far below the largest logit: a vocabulary of exp(16) has a finite sum.
  static constexpr float kSlack = kFast ? 23.0f : 16.0f;

  // 2^x or exp(x).
  __device__ static float power(float x) {
#if defined(GRADSAFE_EMULATE)
    return kFast ? exp2f(x) : expf(x);
#else
    if constexpr (!kFast) return expf(x);
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
#endif
  }
  __device__ static float reference(float logit) { return kFast ? logit * kLog2E : logit; }
  // `power` of it is the exponential of the logit relative to the reference.
  __device__ static float exponent(float logit, float reference) {
    return kFast ? fmaf(logit, kLog2E, -reference) : logit - reference;
  }
  __device__ static float of(float logit, float reference) {
    return power(exponent(logit, reference));
  }
};

// Sums of one thread, relative to its references.
template <bool kFast>
struct Running {
  using Exp = Exponential<kFast>;
  KlMaxima references{kLowestLogit, kLowestLogit};
  float student = 0, teacher = 0, cross = 0;

  __device__ void move_to(const KlMaxima& larger) {
    const float by_student = larger.student - references.student;
    const float by_teacher = larger.teacher - references.teacher;
    const float factor = Exp::power(-by_teacher);
    cross = moved_cross(cross, teacher, by_teacher - by_student, factor);
    student *= Exp::power(-by_student);
    teacher *= factor;
    references = larger;
  }

  // N columns; behind the end of the row stands -inf, which adds nothing.
  // fmaxf passes NaN over; the exponentials then carry it into the sums.
  template <int N>
  __device__ void add(const float (&s)[N], const float (&t)[N]) {
    float largest_s = s[0], largest_t = t[0];
#pragma unroll
    for (int i = 1; i < N; ++i) {
      largest_s = fmaxf(largest_s, s[i]);
      largest_t = fmaxf(largest_t, t[i]);
    }
    const float wanted_s = Exp::reference(largest_s), wanted_t = Exp::reference(largest_t);
    if (wanted_s > references.student + Exp::kSlack || wanted_t > references.teacher + Exp::kSlack) {
      move_to({fmaxf(references.student, wanted_s), fmaxf(references.teacher, wanted_t)});
    }
    // Packs are summed first, which keeps the thread's float32 chain short.
    float e[N], apart[N], pack_student = 0, pack_teacher = 0, pack_cross = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float of_student = Exp::exponent(s[i], references.student);
      const float of_teacher = Exp::exponent(t[i], references.teacher);
      e[i] = Exp::power(of_teacher);
      apart[i] = of_teacher - of_student;
      pack_student += Exp::power(of_student);
      pack_teacher += e[i];
      pack_cross = fmaf(e[i], apart[i], pack_cross);
    }
    if (!(fabsf(pack_cross) < INFINITY)) {
      // 0 * (-inf - s) and 0 * (t + inf) are 0 here: what has no probability has no share.
      pack_cross = 0;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        pack_cross = e[i] == 0.0f ? pack_cross : fmaf(e[i], apart[i], pack_cross);
      }
    }
    student += pack_student;
    teacher += pack_teacher;
    cross += pack_cross;
  }
};

__device__ inline float warp_max(float value) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, mask));
  }
  return value;
}

struct WarpSums {
  double student, teacher, cross;
  float student_reference, teacher_reference;
};

// Of a row; the same in every thread.
struct RowTotals {
  KlMaxima references;
  KlSums sums;
};

// The block's sums. `shared` holds one entry per warp; two rows in a row need two of them, since
// nothing but the barrier in here keeps a fast warp from writing while a slow one reads.
template <bool kFast>
__device__ inline RowTotals block_totals(Running<kFast> own, WarpSums* shared) {
  using Exp = Exponential<kFast>;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  own.move_to({warp_max(own.references.student), warp_max(own.references.teacher)});
  const double student = warp_sum(own.student), teacher = warp_sum(own.teacher);
  const double cross = warp_sum(own.cross);
  if (lane == 0) {
    shared[warp] = {student, teacher, cross, own.references.student, own.references.teacher};
  }
  __syncthreads();
  static_assert(kWarps <= kWarp, "a lane per warp");
  const WarpSums mine = shared[lane % kWarps];
  RowTotals totals;
  totals.references = {warp_max(mine.student_reference), warp_max(mine.teacher_reference)};
  const bool counts = lane < kWarps;
  const float by_student = totals.references.student - mine.student_reference;
  const float by_teacher = totals.references.teacher - mine.teacher_reference;
  const double teacher_factor = Exp::power(-by_teacher);
  const double moved =
      moved_cross<double>(mine.cross, mine.teacher, by_teacher - by_student, teacher_factor);
  totals.sums.student = warp_sum(counts ? mine.student * double{Exp::power(-by_student)} : 0.0);
  totals.sums.teacher = warp_sum(counts ? mine.teacher * teacher_factor : 0.0);
  totals.sums.cross = warp_sum(counts ? moved : 0.0);
  return totals;
}

// The gradient of one row.
template <bool kFast>
struct Gradient {
  using Exp = Exponential<kFast>;
  KlMaxima references;
  float student_scale, teacher_scale;
  bool nothing;  // weight 0 gives +0, whatever the logits hold

  __device__ Gradient(const RowTotals& totals, float weight) : references(totals.references) {
    student_scale = static_cast<float>(weight / totals.sums.student);
    teacher_scale = static_cast<float>(weight / totals.sums.teacher);
    nothing = weight == 0.0f;
  }

  // s becomes the gradient.
  template <int N>
  __device__ void of(float (&s)[N], const float (&t)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      // Never fused: equal logits must give exactly 0.
      const float target = __fmul_rn(Exp::of(t[i], references.teacher), teacher_scale);
      s[i] = __fmul_rn(Exp::of(s[i], references.student), student_scale) - target;
    }
    if (nothing) {
#pragma unroll
      for (int i = 0; i < N; ++i) s[i] = 0.0f;
    }
  }
};

// A thread's columns of one chunk. kWhole: all N of them exist, else the first `left` do.
template <class S, class T>
struct Packs {
  static constexpr int N = kPackSize<S, T>;
  RawPack<S, N> student;
  RawPack<T, N> teacher;

  template <bool kWhole>
  __device__ void widen_to(float (&s)[N], float (&t)[N], int left) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      s[i] = kWhole || i < left ? student.at(i) : -INFINITY;
      t[i] = kWhole || i < left ? teacher.at(i) : -INFINITY;
    }
  }
};

template <bool kWhole, class T, int N>
__device__ inline void store_gradient(T* to, const float (&values)[N], int left) {
  if constexpr (kWhole) {
    store_pack(to, values);
  } else {
    const Pack<T, N> rounded = narrow_pack<T, N>(values);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < left) to[i] = rounded.v[i];
    }
  }
}

template <class S, class T>
constexpr bool kFastExp = sizeof(S) == 2 && sizeof(T) == 2;

// ---- rows on any border: read twice ----------------------------------------------------------
template <class S, class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    kl_rows(const __grid_constant__ Call call) {
  constexpr int N = kPackSize<S, T>, kStep = kThreads * N;
  constexpr bool kFast = kFastExp<S, T>;
  __shared__ WarpSums shared[2][kWarps];
  const KlProblem& p = call.problem;
  int turn = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x, turn ^= 1) {
    const S* student = static_cast<const S*>(p.student) + row * p.student_stride;
    const T* teacher = static_cast<const T*>(p.teacher) + row * p.teacher_stride;
    float s[N], t[N];
    const auto read = [&](int64_t col, int left) {
      Packs<S, T> packs;
      packs.student.template load<false>(student + col, left);
      packs.teacher.template load<false>(teacher + col, left);
      packs.template widen_to<false>(s, t, left);
    };
    Running<kFast> own;
    for (int64_t col = threadIdx.x * N; col < p.vocabulary; col += kStep) {
      read(col, static_cast<int>(min(p.vocabulary - col, int64_t{N})));
      own.add(s, t);
    }
    const RowTotals totals = block_totals(own, shared[turn]);
    if (threadIdx.x == kThreads - 1) {
      p.out[row] = kl_value(totals.sums, Exponential<kFast>::kUnit);
    }
    if (p.gradient == nullptr) continue;
    const Gradient<kFast> gradient(totals, p.weight[row]);
    S* const out = static_cast<S*>(p.gradient) + row * p.student_stride;
    for (int64_t col = threadIdx.x * N; col < p.vocabulary; col += kStep) {
      const int left = static_cast<int>(min(p.vocabulary - col, int64_t{N}));
      read(col, left);
      gradient.of(s, t);
      store_gradient<false>(out + col, s, left);
    }
  }
}

// ---- rows on 16-byte borders: a ring of chunks -----------------------------------------------
// How a row passes through the ring.
struct Plan {
  int chunks, whole;  // of a row: all; those without a ragged end
  int kept, again;    // chunks that stay for pass 2; those before them, which are loaded again
};

// A thread's place in the slots of the ring. A slot holds one chunk: packs of the student, one per
// thread, then those of the teacher.
template <class S, class T>
struct Place {
  using Student = RawPack<S, kPackSize<S, T>>;
  using Teacher = RawPack<T, kPackSize<S, T>>;
  static constexpr int kSlotBytes = kThreads * static_cast<int>(sizeof(Student) + sizeof(Teacher));
  unsigned char *begin, *end;  // the thread's Student in the first slot, and behind the last
  unsigned char* at;

  __device__ Place(unsigned char* ring, int slots)
      : begin(ring + threadIdx.x * sizeof(Student)), end(begin + slots * kSlotBytes), at(begin) {}
  __device__ void next() {
    at += kSlotBytes;
    if (at == end) at = begin;
  }
  __device__ Student* student() const { return reinterpret_cast<Student*>(at); }
  __device__ Teacher* teacher() const {
    // The teacher's packs may be larger than the student's.
    const int offset = kThreads * static_cast<int>(sizeof(Student)) +
                       static_cast<int>(threadIdx.x) *
                           (static_cast<int>(sizeof(Teacher)) - static_cast<int>(sizeof(Student)));
    return reinterpret_cast<Teacher*>(at + offset);
  }
  __device__ Packs<S, T> packs() const { return {*student(), *teacher()}; }
};

// Starts the block's loads in the order in which they enter the ring: row after row all chunks,
// then, the latest first, those that pass 1 has freed. Each call ends one group of cp.async.
template <class S, class T>
struct Loader {
  static constexpr int N = kPackSize<S, T>, kStep = kThreads * N;
  const KlProblem& p;
  const Plan plan;
  Place<S, T> place;
  int64_t row;
  int next = 0;  // of this row's loads
  const S* student;  // where the thread's part of the row begins
  const T* teacher;

  __device__ Loader(const KlProblem& problem, const Plan& row_plan, const Place<S, T>& first)
      : p(problem), plan(row_plan), place(first), row(blockIdx.x) {
    begin_row();
  }

  __device__ void begin_row() {
    student = static_cast<const S*>(p.student) + row * p.student_stride + threadIdx.x * N;
    teacher = static_cast<const T*>(p.teacher) + row * p.teacher_stride + threadIdx.x * N;
  }

  __device__ void start() {
    if (row < p.rows) {
      const int chunk = next < plan.chunks ? next : plan.chunks + plan.again - 1 - next;
      const int64_t first = int64_t{chunk} * kStep;
      if (chunk < plan.whole) {
        copy<true>(place.student(), student + first, N);
        copy<true>(place.teacher(), teacher + first, N);
      } else {
        const int left = static_cast<int>(p.vocabulary - first) - static_cast<int>(threadIdx.x) * N;
        copy<false>(place.student(), student + first, left);
        copy<false>(place.teacher(), teacher + first, left);
      }
      place.next();
      if (++next == plan.chunks + plan.again) {
        next = 0;
        row += gridDim.x;
        begin_row();
      }
    }
    cp_async_commit();
  }

  template <bool kWhole, class E>
  __device__ static void copy(RawPack<E, N>* to, const E* from, int left) {
    constexpr int kPart = kVectorBytes / static_cast<int>(sizeof(E));
#pragma unroll
    for (int c = 0; c < RawPack<E, N>::kLoads; ++c) {
      if constexpr (kWhole) {
        cp_async16(&to->chunks[c], from + c * kPart);
      } else {
        const int valid = min(left - c * kPart, kPart) * static_cast<int>(sizeof(E));
        if (valid > 0) cp_async16(&to->chunks[c], from + c * kPart, valid);
      }
    }
  }
};

// Waits for the load that was started `ring` groups ago.
template <int kIndex = 0>
__device__ inline void wait_for_oldest(int ring) {
  if constexpr (kIndex + 1 == kRings) {
    cp_async_wait<ring_size(kIndex) - 1>();
  } else {
    if (ring == ring_size(kIndex)) cp_async_wait<ring_size(kIndex) - 1>();
    else wait_for_oldest<kIndex + 1>(ring);
  }
}

template <class S, class T>
__global__ void __launch_bounds__(kThreads) kl_ring(const __grid_constant__ Call call) {
  constexpr int N = kPackSize<S, T>, kStep = kThreads * N;
  constexpr bool kFast = kFastExp<S, T>;
  GRADSAFE_DYNAMIC_SHARED(unsigned char, slots);
  __shared__ WarpSums shared[2][kWarps];
  const KlProblem& p = call.problem;
  const int ring = call.ring;
  const bool wanted = p.gradient != nullptr;
  Plan plan;
  plan.chunks = static_cast<int>((p.vocabulary + kStep - 1) / kStep);
  plan.whole = static_cast<int>(p.vocabulary / kStep);
  plan.kept = wanted ? min(plan.chunks, ring - kRoom) : 0;
  plan.again = wanted ? plan.chunks - plan.kept : 0;

  // Every step waits, works on one chunk, and starts one load or none: a load is needed `ring` or
  // more steps after it was started. Slots become free in the order in which they were filled.
  Place<S, T> met(slots, ring);  // the slot of the next chunk to be met for the first time
  Loader<S, T> loader(p, plan, met);
  for (int i = 0; i < ring; ++i) loader.start();
  Place<S, T> held = met;  // the slot that becomes free next
  int turn = 0;
  float s[N], t[N];
  const auto left_of = [&](int chunk) {
    return static_cast<int>(p.vocabulary - int64_t{chunk} * kStep) -
           static_cast<int>(threadIdx.x) * N;
  };

  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x, turn ^= 1) {
    Running<kFast> own;
    for (int chunk = 0; chunk < plan.chunks; ++chunk) {
      wait_for_oldest(ring);
      if (chunk < plan.whole) {
        met.packs().template widen_to<true>(s, t, N);
        own.add(s, t);
      } else if (const int left = left_of(chunk); left > 0) {
        met.packs().template widen_to<false>(s, t, left);
        own.add(s, t);
      }
      met.next();
      if (chunk < plan.chunks - plan.kept) {
        held.next();
        loader.start();
      } else {
        cp_async_commit();
      }
    }
    const RowTotals totals = block_totals(own, shared[turn]);
    if (threadIdx.x == kThreads - 1) {
      p.out[row] = kl_value(totals.sums, Exponential<kFast>::kUnit);
    }
    if (!wanted) continue;

    const Gradient<kFast> gradient(totals, p.weight[row]);
    S* const out = static_cast<S*>(p.gradient) + row * p.student_stride + threadIdx.x * N;
    for (int step = 0; step < plan.chunks; ++step) {
      const int chunk = step < plan.kept ? plan.again + step : plan.chunks - 1 - step;
      wait_for_oldest(ring);
      if (chunk < plan.whole) {
        held.packs().template widen_to<true>(s, t, N);
        gradient.of(s, t);
        store_gradient<true>(out + int64_t{chunk} * kStep, s, N);
      } else if (const int left = left_of(chunk); left > 0) {
        held.packs().template widen_to<false>(s, t, left);
        gradient.of(s, t);
        store_gradient<false>(out + int64_t{chunk} * kStep, s, left);
      }
      if (step >= plan.kept) met.next();
      held.next();
      loader.start();
    }
  }
}

// ---- host ------------------------------------------------------------------------------------
using Kernel = void (*)(Call);

struct Kernels {
  Kernel rows, ring;
  int64_t chunk_bytes;  // of shared memory
};

template <class S, class T>
Kernels kernels() {
  return {&kl_rows<S, T>, &kl_ring<S, T>, Place<S, T>::kSlotBytes};
}

template <class S>
Kernels choose_teacher(DType dtype) {
  switch (dtype) {
    case DType::f32: return kernels<S, float>();
    case DType::bf16: return kernels<S, bf16>();
    default: return kernels<S, f16>();
  }
}

Kernels choose(const KlProblem& p) {
  switch (p.student_dtype) {
    case DType::f32: return choose_teacher<float>(p.teacher_dtype);
    case DType::bf16: return choose_teacher<bf16>(p.teacher_dtype);
    default: return choose_teacher<f16>(p.teacher_dtype);
  }
}

struct Choice {
  int32_t ring = 0;  // chunks; 0: shared memory is too small for any
  int32_t blocks = 1;  // per SM
};

// Short rows take a ring of which two fit an SM, others the largest that the device can hold.
Choice choose_ring(int64_t row_bytes, int64_t chunk_bytes, int64_t shared_bytes) {
  constexpr int kShort = 2;  // index of that ring
  const int64_t available = shared_bytes - 2 * kWarps * static_cast<int64_t>(sizeof(WarpSums));
  Choice choice;
  for (int i = kRings - 1; i >= 0; --i) {
    if (ring_size(i) * chunk_bytes > available) break;
    choice.ring = ring_size(i);
    if (i >= kShort && row_bytes <= (ring_size(i) - kRoom) * chunk_bytes) {
      choice.blocks = 2;
      break;
    }
  }
  return choice;
}

}  // namespace

Status kl_divergence_cuda(const KlProblem& p, void* stream) {
  Call call{};
  call.problem = p;
  const Kernels kernels = choose(p);
  if (starts_aligned(p.student, p.student_stride, size_of(p.student_dtype), p.rows) &&
      starts_aligned(p.teacher, p.teacher_stride, size_of(p.teacher_dtype), p.rows)) {
    DeviceLimits limits;
    const Status status = device_limits(limits);
    if (!status.ok()) return status;
    const int64_t row_bytes = p.vocabulary * (size_of(p.student_dtype) + size_of(p.teacher_dtype));
    const Choice choice = choose_ring(row_bytes, kernels.chunk_bytes, limits.shared_bytes);
    if (choice.ring > 0) {
      call.ring = choice.ring;
      const int64_t blocks = int64_t{limits.multiprocessors} * choice.blocks;
      const dim3 grid(static_cast<unsigned>(std::min(p.rows, blocks)));
      return launch(kernels.ring, grid, dim3(kThreads), choice.ring * kernels.chunk_bytes, stream,
                    call);
    }
  }
  const dim3 grid(static_cast<unsigned>(std::min(p.rows, kMaxBlocks)));
  return launch(kernels.rows, grid, dim3(kThreads), 0, stream, call);
}

}  // namespace gradsafe

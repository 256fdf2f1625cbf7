// Entry "faulty": a collection of the mistakes that the emulated grid is there to find, one kernel
// each. tests/emulated/test_checks.py shows that every one of them is found, and by which check.
#include "cases.h"
#include "common/async_copy.cuh"
#include "common/reduce.cuh"

namespace gradsafe {
namespace {

enum Fault {
  kNone, kBarrierInBranches, kReturnBeforeBarrier, kShuffleInBranch, kMasksDiffer, kNotInMask,
  kNoSyncwarp, kNoBarrier, kNoBarrierBeforeReuse, kBlocksShareResult, kTicketWithoutFence,
  kReadsBehindEnd, kWritesBeforeStart, kMisaligned, kWritesInput, kUnwrittenShared,
  kUnwrittenOutput, kSharedOverflow, kSharedOverflowOfOther, kDynamicOverflow, kCopyInFlight,
  kCopyWithoutBarrier, kResultByArrival, kHostReadsDevice, kFaults
};

// 64 threads, 2 blocks; in[64], out[128], ticket 0. Without a fault: out = 2 in, once per block.
template <int kFault>
__global__ void faulty(const float* in, float* out, unsigned* ticket) {
  __shared__ __align__(16) float first[64];
  __shared__ float second[64];
  GRADSAFE_DYNAMIC_SHARED(float, dynamic);
  const int t = threadIdx.x, lane = t % kWarp;
  float* result = out + blockIdx.x * 64;

  if (kFault == kReturnBeforeBarrier && t == 63) return;
  if (kFault == kCopyInFlight || kFault == kCopyWithoutBarrier) {
    if (t % 4 == 0) {
      cp_async16(first + t, in + t);
      cp_async_commit();
      if (kFault == kCopyWithoutBarrier) cp_async_wait<0>();
    }
    if (kFault == kCopyInFlight) __syncthreads();
    result[t] = 2 * first[t];
    return;
  }
  if (kFault != kUnwrittenShared || t != 3) first[t] = in[kFault == kReadsBehindEnd ? t + 1 : t];
  second[t] = 0;
  if (kFault == kBarrierInBranches) {
    if (t < 32) __syncthreads();
    else __syncthreads();
  } else if (kFault == kNoSyncwarp) {
    result[t] = 2 * first[t ^ 1];
    return;
  } else if (kFault != kNoBarrier) {
    __syncthreads();
  }

  float value = first[63 - t];
  if (kFault == kShuffleInBranch && lane < 16) value = __shfl_xor_sync(kAllLanes, value, 1);
  if (kFault == kMasksDiffer) value = __shfl_xor_sync(lane < 16 ? kAllLanes : ~1u, value, 0);
  if (kFault == kNotInMask) value = __shfl_xor_sync(0xffffu, value, 0);
  if (kFault != kNoBarrierBeforeReuse) __syncthreads();
  first[t] = 2 * value;
  __syncthreads();
  value = first[63 - t];

  if (kFault == kBlocksShareResult) result = out;  // both write the same values: still a race
  if (kFault == kMisaligned) value = __ldcs(reinterpret_cast<const float4*>(in + 1)).x;
  if (kFault == kWritesInput) const_cast<float*>(in)[t] = value;
  if (kFault == kUnwrittenOutput) value += result[t];
  if (kFault == kSharedOverflow) second[t + kFault] = value;
  if (kFault == kSharedOverflowOfOther) {
    float* hidden = second;  // from the compiler's own bounds checks
    asm("" : "+r"(hidden));
    hidden[4096 + t] = value;
  }
  dynamic[kFault == kDynamicOverflow ? t + 1 : t] = value;
  if (kFault == kResultByArrival && t == 0) {
    out[atomicAdd(ticket, 1u) * 64] = static_cast<float>(blockIdx.x);
    return;
  }
  if (kFault == kResultByArrival) return;
  result[kFault == kWritesBeforeStart ? t - 1 : t] = value;

  if (kFault == kTicketWithoutFence) {
    __shared__ unsigned place;
    __syncthreads();
    if (t == 0) place = atomicInc(ticket, gridDim.x - 1);
    __syncthreads();
    if (place == gridDim.x - 1) out[t] += out[64 + t];
  }
}

using Run = Status (*)(const float*, float*, unsigned*);

template <int kFault>
Status run(const float* in, float* out, unsigned* ticket) {
  return launch(&faulty<kFault>, dim3(2), dim3(64), 64 * sizeof(float), nullptr, in, out, ticket);
}

template <int... kFault>
Run choose(int fault, std::integer_sequence<int, kFault...>) {
  static const Run all[] = {&run<kFault>...};
  return all[fault];
}

// Integer: the fault. Buffers: 64 floats; the ticket.
Status run_faulty(emulated::Case& c) {
  const int fault = static_cast<int>(c.integer());
  const float* values = static_cast<const float*>(c.input());
  unsigned* ticket = static_cast<unsigned*>(c.inout());
  float* result = static_cast<float*>(c.output(128 * sizeof(float)));
  if (fault == kHostReadsDevice && values[0] != 0) return {StatusCode::cuda_error, 0};
  return choose(fault, std::make_integer_sequence<int, kFaults>{})(values, result, ticket);
}
const emulated::Entry entry("faulty", &run_faulty);

}  // namespace
}  // namespace gradsafe

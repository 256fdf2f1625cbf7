// Hands tiles of gradient surgery, alone or with AdamW, to the kernels of the instruction set in
// use.
#include "gradsafe/surgery.h"

#include <algorithm>

#include "gradsafe/surgery_adamw.h"
#include "kernels.h"

namespace gradsafe {
namespace {

void* at(const void* data, int64_t index, DType dtype) {
  return static_cast<char*>(const_cast<void*>(data)) + index * size_of(dtype);
}

SurgeryRange range_of(const SurgeryTask& task, int64_t tile) {
  const int64_t begin = tile * kSurgeryTile;
  return {at(task.user, begin, task.dtype), at(task.align, begin, task.dtype),
          std::min(kSurgeryTile, task.count - begin), task.dtype};
}

}  // namespace

void surgery_cpu_sums(const SurgeryTask& task, int64_t tile, double* partial) {
  kernels().surgery_sums(range_of(task, tile), partial);
}

void surgery_cpu_merge(const SurgeryTask& task, int64_t tile, float coefficient) {
  kernels().surgery_merge(range_of(task, tile), coefficient);
}

void surgery_adamw_cpu_update(const SurgeryAdamwTask& task, int64_t tile, float coefficient,
                              const AdamwScalars& scalars) {
  const DType dtype = task.pair.dtype;
  const int64_t begin = tile * kSurgeryTile;
  const SurgeryAdamwRange range{range_of(task.pair, tile), at(task.param, begin, dtype),
                                at(task.exp_avg, begin, dtype),
                                at(task.exp_avg_sq, begin, dtype)};
  kernels().surgery_adamw(range, coefficient, scalars);
}

}  // namespace gradsafe

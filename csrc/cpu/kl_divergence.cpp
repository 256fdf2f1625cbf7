// Walks over a row in segments that stay in the first-level cache: the kernels of the instruction
// set in use find a segment's maxima and sums, and the sums of a row are kept in float64, moved to
// larger maxima where a segment brings one. A second walk writes the gradient.
#include "gradsafe/kl_divergence.h"

#include <algorithm>

#include "kernels.h"

namespace gradsafe {
namespace {

constexpr int64_t kSegment = 1024;  // columns; a lane's float32 chain is then 64 terms long

const char* element(const void* data, DType dtype, int64_t index) {
  return static_cast<const char*>(data) + index * size_of(dtype);
}

KlSegment segment_at(const KlProblem& p, int64_t row, int64_t col) {
  KlSegment s{};
  s.student_dtype = p.student_dtype;
  s.teacher_dtype = p.teacher_dtype;
  s.student = element(p.student, p.student_dtype, row * p.student_stride + col);
  s.teacher = element(p.teacher, p.teacher_dtype, row * p.teacher_stride + col);
  s.count = std::min(kSegment, p.vocabulary - col);
  return s;
}

double growth(float before, float after) {
  return static_cast<double>(after) - static_cast<double>(before);
}

// exp(-growth); 0 where it would be 0 in float32, as for the logits themselves.
double factor(double growth) { return growth == 0 ? 1.0 : growth > 104 ? 0.0 : exp(-growth); }

void write_gradient(const KlProblem& p, int64_t row, const KlScales& scales,
                    const CpuKernels& kernel) {
  char* out = static_cast<char*>(p.gradient) + row * p.student_stride * size_of(p.student_dtype);
  if (scales.weight == 0) {  // +0 in every dtype, whatever the logits hold
    std::fill_n(out, p.vocabulary * size_of(p.student_dtype), char{0});
    return;
  }
  for (int64_t col = 0; col < p.vocabulary; col += kSegment) {
    kernel.kl_gradient(segment_at(p, row, col), scales, out + col * size_of(p.student_dtype));
  }
}

}  // namespace

void kl_divergence_cpu(const KlProblem& p, int64_t begin, int64_t end) {
  const CpuKernels& kernel = kernels();
  for (int64_t row = begin; row < end; ++row) {
    KlMaxima maxima{kLowestLogit, kLowestLogit};
    KlSums total{};
    for (int64_t col = 0; col < p.vocabulary; col += kSegment) {
      const KlMaxima before = maxima;
      KlSums part{};
      kernel.kl_sums(segment_at(p, row, col), &maxima, &part);
      const double of_student = growth(before.student, maxima.student);
      const double of_teacher = growth(before.teacher, maxima.teacher);
      const double teacher = factor(of_teacher);
      total.cross = moved_cross(total.cross, total.teacher, of_teacher - of_student, teacher);
      total.cross += part.cross;
      total.student = total.student * factor(of_student) + part.student;
      total.teacher = total.teacher * teacher + part.teacher;
    }
    p.out[row] = kl_value(total);
    if (!p.gradient) continue;
    KlScales scales{};
    scales.maxima = maxima;
    scales.student = static_cast<float>(1.0 / total.student);
    scales.teacher = static_cast<float>(1.0 / total.teacher);
    scales.weight = p.weight[row];
    write_gradient(p, row, scales, kernel);
  }
}

}  // namespace gradsafe

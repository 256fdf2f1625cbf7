// The argument side of gradient surgery, shared by its CPU and CUDA operators.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "checks.h"
#include "gradsafe/surgery_adamw.h"

namespace gradsafe {

using IntList = torch::headeronly::HeaderOnlyArrayRef<int64_t>;

// Memory of the tensors of a call. Blocks run in any order, so nothing that is written may be
// reachable twice.
class Extents {
 public:
  void add(const void* data, int64_t bytes, bool written, const Name& name) {
    if (bytes == 0) return;
    const char* begin = static_cast<const char*>(data);
    all_.push_back({begin, begin + bytes, written, name});
  }

  void check(const char* op) {
    std::sort(all_.begin(), all_.end(), [](const Extent& a, const Extent& b) {
      return std::less<const char*>()(a.begin, b.begin);
    });
    const Extent* furthest = nullptr;          // of all before
    const Extent* furthest_written = nullptr;  // of those that are written
    for (const Extent& e : all_) {
      const Extent* other = e.written ? furthest : furthest_written;
      const bool apart = other == nullptr || !(e.begin < other->end);
      GRADSAFE_CHECK(apart, op, ": expected ", e.name, " and ", (apart ? e : *other).name,
                     " not to share memory");
      if (furthest == nullptr || e.end > furthest->end) furthest = &e;
      if (e.written && (furthest_written == nullptr || e.end > furthest_written->end)) {
        furthest_written = &e;
      }
    }
  }

 private:
  struct Extent {
    const char* begin;
    const char* end;
    bool written;
    Name name;
  };
  std::vector<Extent> all_;
};

// True if the elements fill an unbroken piece of memory, in whatever order of dimensions.
inline bool is_unbroken(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) != 1) dims.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

inline std::string stride_text(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    text += (d ? ", " : "") + std::to_string(tensor.stride(d));
  }
  return text + "]";
}

// Shape, strides, dtype and device of `first`.
inline void check_twin(const Tensor& tensor, const Tensor& first, const char* op,
                       const Name& name, const Name& first_name) {
  bool same_shape = tensor.dim() == first.dim(), same_strides = true;
  for (int64_t d = 0; same_shape && d < first.dim(); ++d) {
    same_shape = tensor.size(d) == first.size(d);
    same_strides = same_strides && (first.size(d) <= 1 || tensor.stride(d) == first.stride(d));
  }
  GRADSAFE_CHECK(same_shape, op, ": expected ", name, " of shape ", shape_text(first), " like ",
                 first_name, ", got ", shape_text(tensor));
  GRADSAFE_CHECK(tensor.numel() == 0 || same_strides, op, ": expected ", name, " with strides ",
                 stride_text(first), " like ", first_name, ", got ", stride_text(tensor));
  GRADSAFE_CHECK(tensor.scalar_type() == first.scalar_type(), op, ": expected ", name,
                 " of the dtype of ", first_name);
  check_same_device(tensor, first, op, name);
}

inline std::vector<SurgeryTask> parse_surgery(const char* op, const std::vector<Tensor>& user,
                                              const std::vector<Tensor>& align, IntList groups,
                                              int64_t num_groups, bool writes_user,
                                              Extents& extents) {
  GRADSAFE_CHECK(align.size() == user.size(), op, ": expected ", user.size(),
                 " tensors in align, got ", align.size());
  GRADSAFE_CHECK(num_groups >= 0, op, ": expected num_groups >= 0, got ", num_groups);
  GRADSAFE_CHECK(groups.size() == 0 || groups.size() == user.size(), op, ": expected one group for "
                 "each of ", user.size(), " tensors, got ", groups.size());
  std::vector<SurgeryTask> tasks;
  tasks.reserve(user.size());
  for (size_t i = 0; i < user.size(); ++i) {
    const Name name = item("user", i), align_name = item("align", i);
    const int64_t group = groups.size() == 0 ? 0 : groups[i];
    GRADSAFE_CHECK(group >= 0 && group < num_groups, op, ": expected ", item("groups", i),
                   " between 0 and ", num_groups - 1, ", got ", group);
    SurgeryTask task{};
    task.dtype = dtype_of(user[i], op, name);
    GRADSAFE_CHECK(user[i].numel() == 0 || is_unbroken(user[i]), op, ": expected ", name,
                   " without gaps or overlaps, got strides ", stride_text(user[i]),
                   "; call .contiguous() first");
    check_same_device(user[i], user[0], op, name);
    check_twin(align[i], user[i], op, align_name, name);
    task.user = writes_user ? user[i].mutable_data_ptr()
                            : const_cast<void*>(user[i].const_data_ptr());
    task.align = align[i].const_data_ptr();
    task.count = user[i].numel();
    task.group = static_cast<int32_t>(group);
    const int64_t bytes = task.count * size_of(task.dtype);
    extents.add(task.user, bytes, writes_user, name);
    extents.add(task.align, bytes, false, align_name);
    tasks.push_back(task);
  }
  return tasks;
}

// sums [G, 3], contiguous, float64; returns G.
inline int64_t parse_sums(const char* op, const Tensor& sums) {
  GRADSAFE_CHECK(sums.dim() == 2 && sums.size(1) == kSurgerySums && sums.is_contiguous() &&
                     sums.scalar_type() == ScalarType::Double,
                 op, ": expected sums of shape [G, 3], contiguous and float64, got shape ",
                 shape_text(sums));
  return sums.size(0);
}

struct SurgeryAdamwCall {
  std::vector<SurgeryAdamwTask> tasks;
  std::vector<SurgeryTask> pairs;
  std::vector<float*> steps;  // every counter once
};

inline SurgeryAdamwCall parse_surgery_adamw(const std::vector<Tensor>& params,
                                            const std::vector<Tensor>& user,
                                            const std::vector<Tensor>& align,
                                            const std::vector<Tensor>& exp_avg,
                                            const std::vector<Tensor>& exp_avg_sq,
                                            const std::vector<Tensor>& steps, IntList groups,
                                            int64_t num_groups) {
  constexpr const char* op = "surgery_adamw_";
  const size_t n = params.size();
  Extents extents;
  SurgeryAdamwCall call;
  for (const auto& [list, name] : {std::make_pair(&user, "user"), {&align, "align"},
                                   {&exp_avg, "exp_avg"}, {&exp_avg_sq, "exp_avg_sq"}}) {
    GRADSAFE_CHECK(list->size() == n, op, ": expected ", n, " tensors in ", name,
                   " like params, got ", list->size());
  }
  GRADSAFE_CHECK(n > 0, op, ": expected at least one parameter");
  GRADSAFE_CHECK(steps.size() == n || steps.size() == 1, op, ": expected ", n,
                 " step counters or one for all, got ", steps.size());
  call.pairs = parse_surgery(op, user, align, groups, num_groups, false, extents);
  for (size_t i = 0; i < steps.size(); ++i) {
    const Name name = item("step", i);
    GRADSAFE_CHECK(steps[i].numel() == 1 && steps[i].scalar_type() == ScalarType::Float, op,
                   ": expected ", name, " with one float32 element, got shape ",
                   shape_text(steps[i]));
    check_same_device(steps[i], params[0], op, name);
    call.steps.push_back(static_cast<float*>(steps[i].mutable_data_ptr()));
    extents.add(call.steps.back(), 4, true, name);
  }
  for (size_t i = 0; i < n; ++i) {
    SurgeryAdamwTask task{};
    task.pair = call.pairs[i];
    task.step = call.steps[steps.size() == 1 ? 0 : i];
    const int64_t bytes = task.pair.count * size_of(task.pair.dtype);
    const auto written = [&](const Tensor& tensor, const char* list) {
      const Name name = item(list, i);
      check_twin(tensor, user[i], op, name, item("user", i));
      void* data = tensor.mutable_data_ptr();
      extents.add(data, bytes, true, name);
      return data;
    };
    task.param = written(params[i], "params");
    task.exp_avg = written(exp_avg[i], "exp_avg");
    task.exp_avg_sq = written(exp_avg_sq[i], "exp_avg_sq");
    call.tasks.push_back(task);
  }
  extents.check(op);
  return call;
}

}  // namespace gradsafe

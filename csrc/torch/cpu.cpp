// CPU kernels of the operators: tensors in, plain structs out, threads from torch's own pool.
#include <algorithm>
#include <memory>
#include <numeric>
#include <tuple>

#include "../common/expert_groups.h"
#include "cosine_topk.h"
#include "kl_divergence.h"
#include "moments.h"
#include "parallel.h"
#include "wgrad_moments.h"

namespace gradsafe {
namespace {

// Calls body(task, tile) for every tile of every task. Work is dealt out by elements, so that a
// list of many small matrices is not cut finer than its threads can use.
template <class Body>
void for_each_tile(const std::vector<MomentsTiling>& tilings, const Body& body) {
  std::vector<int64_t> first{0};
  int64_t elements = 0;
  for (const MomentsTiling& t : tilings) {
    first.push_back(first.back() + t.tiles());
    elements += t.rows * t.cols;
  }
  const int64_t tiles = first.back();
  if (tiles == 0) return;
  const int64_t grain = grain_for(tiles, elements);
  parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    size_t task = 0;
    for (int64_t tile = begin; tile < end; ++tile) {
      while (tile >= first[task + 1]) ++task;
      body(task, tile - first[task]);
    }
  });
}

Tensor moments(std::vector<Tensor> grads, std::vector<Tensor> refs, int64_t num_refs, int64_t axis,
               bool unsigned_dots) {
  const MomentsCall call = parse_moments(grads, refs, num_refs, axis, unsigned_dots);
  GRADSAFE_CHECK(!grads.empty(), "moments: expected at least one gradient");
  const size_t n = call.tasks.size();
  std::vector<MomentsTiling> tilings(n);
  std::vector<int64_t> workspace_at(n + 1, 0);
  for (size_t i = 0; i < n; ++i) {
    tilings[i] = tile_moments_cpu(call.problem, call.tasks[i]);
    workspace_at[i + 1] = workspace_at[i] + moments_cpu_workspace(call.problem, tilings[i]);
  }
  Tensor out = torch::stable::new_empty(grads[0], {call.out_offsets[n]}, ScalarType::Double);
  Tensor workspace = torch::stable::new_empty(grads[0], {workspace_at[n]}, ScalarType::Double);
  double* results = static_cast<double*>(out.mutable_data_ptr());
  double* partials = static_cast<double*>(workspace.mutable_data_ptr());

  for_each_tile(tilings, [&](size_t task, int64_t tile) {
    moments_cpu_tile(call.problem, call.tasks[task], tilings[task], tile,
                     partials + workspace_at[task]);
  });
  for (size_t i = 0; i < n; ++i) {
    moments_cpu_finish(call.problem, call.tasks[i], tilings[i], partials + workspace_at[i],
                       results + call.out_offsets[i]);
  }
  return out;
}

// Partial sums are kept for as many groups at a time as fit this many float64 elements.
constexpr int64_t kWgradWorkspace = int64_t{1} << 23;

Tensor run_wgrad_moments(const WgradArguments& a, const Tensor& x) {
  const WgradProblem& p = a.problem;
  Tensor out = torch::stable::new_empty(x, {p.samples, a.per_sample}, ScalarType::Double);
  Tensor rows = torch::stable::new_empty(x, {a.rows}, ScalarType::Int);
  double* results = static_cast<double*>(out.mutable_data_ptr());
  int32_t* tokens = static_cast<int32_t*>(rows.mutable_data_ptr());

  std::vector<ActiveTokens> active(p.samples);
  const int64_t all_tokens = std::accumulate(a.lengths.begin(), a.lengths.end(), int64_t{0});
  const int64_t scanned = all_tokens * (p.in_features + p.out_features);
  parallel_for(0, p.samples, grain_for(p.samples, scanned), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      active[b] = find_active_tokens(p, b, tokens + a.starts[b]);
    }
  });
  int64_t longest = 0;
  for (const ActiveTokens& sample : active) longest = std::max(longest, sample.count);

  const ExpertGroups groups(p);
  const int64_t per_sample = wgrad_moments_cpu_workspace(p);
  const int64_t tiles = tile_wgrad_moments_cpu(p).tiles();
  const int64_t entries = p.in_features * p.out_features;
  // An entry costs about a sixteenth of an operation per token, and a few for its score.
  const int64_t computed = entries * (all_tokens / 16 + p.samples);
  for (int64_t first = 0, last = 0; first < groups.size(); first = last) {
    int64_t samples = 0;
    do {
      samples += groups[last++].count;
    } while (last < groups.size() &&
             (samples + groups[last].count) * per_sample <= kWgradWorkspace);
    Tensor workspace = torch::stable::new_empty(x, {samples * per_sample}, ScalarType::Double);
    double* partials = static_cast<double*>(workspace.mutable_data_ptr());
    const int64_t* begin_samples = groups[first].samples;
    const auto part = [&](const int64_t* sample) {
      return partials + (sample - begin_samples) * per_sample;
    };
    deal_out((last - first) * tiles, computed, [&](auto next) {
      const std::unique_ptr<float[]> scratch(new float[wgrad_moments_cpu_scratch(longest)]);
      for (int64_t item; next(item);) {
        const SampleGroup& group = groups[first + item / tiles];
        wgrad_moments_cpu_tile(p, group, active.data(), item % tiles, part(group.samples),
                               scratch.get(), longest);
      }
    });
    const int64_t grain = grain_for(samples, samples * per_sample);
    parallel_for(0, samples, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        wgrad_moments_cpu_finish(p, partials + i * per_sample,
                                 results + begin_samples[i] * a.per_sample);
      }
    });
  }
  return out;
}

Tensor wgrad_moments(Tensor x, Tensor dy, std::vector<Tensor> refs, IntList lengths, int64_t axis,
                     bool unsigned_dots) {
  const WgradArguments arguments =
      parse_wgrad_moments(x, dy, refs, to_vector(lengths), axis, unsigned_dots);
  return run_wgrad_moments(arguments, x);
}

Tensor grouped_wgrad_moments(Tensor x, Tensor dy, std::vector<Tensor> refs, IntList lengths,
                             IntList experts, int64_t axis, bool unsigned_dots) {
  const WgradArguments arguments = parse_grouped_wgrad_moments(
      x, dy, refs, to_vector(lengths), to_vector(experts), axis, unsigned_dots);
  return run_wgrad_moments(arguments, x);
}

// Rows are dealt out in one segment per thread. Which segment saw a row does not enter the result:
// the best k of the best k of every segment are the best k, and all keys differ.
void cosine_topk_group(const CosineProblem& p, const CosineQueries& queries, uint64_t* keys,
                       int64_t segments, float* scores, int64_t* indices) {
  const auto new_scratch = [&] {
    return std::unique_ptr<double[]>(new double[cosine_topk_cpu_scratch(p)]);
  };
  const int64_t panels = cosine_panels(p.queries);
  const int64_t packed = p.queries * p.features;
  parallel_for(0, panels, grain_for(panels, packed), [&](int64_t begin, int64_t end) {
    const auto scratch = new_scratch();
    for (int64_t panel = begin; panel < end; ++panel) {
      cosine_topk_cpu_pack(p, panel, queries, scratch.get());
    }
  });
  const int64_t blocks = (p.rows + kCosineRows - 1) / kCosineRows;
  const auto first_row = [&](int64_t s) {
    return std::min(blocks * s / segments * kCosineRows, p.rows);
  };
  parallel_for(0, segments, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = new_scratch();
    for (int64_t s = begin; s < end; ++s) {
      cosine_topk_cpu_segment(p, queries, first_row(s), first_row(s + 1), scratch.get(),
                              keys + s * p.queries * p.k);
    }
  });
  const int64_t joined = p.queries * p.k * segments;
  parallel_for(0, p.queries, grain_for(p.queries, joined), [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> all;
    for (int64_t q = begin; q < end; ++q) {
      all.clear();
      for (int64_t s = 0; s < segments; ++s) {
        const uint64_t* best = keys + (s * p.queries + q) * p.k;
        all.insert(all.end(), best, best + std::min(p.k, first_row(s + 1) - first_row(s)));
      }
      cosine_topk_cpu_finish(p, all.data(), static_cast<int64_t>(all.size()), scores + q * p.k,
                             indices + q * p.k);
    }
  });
}

std::tuple<Tensor, Tensor> cosine_topk(Tensor queries, Tensor rows, int64_t k, int64_t start) {
  CosineProblem p = parse_cosine_topk(queries, rows, k, start);
  Tensor scores = torch::stable::new_empty(queries, {p.queries, k}, ScalarType::Float);
  Tensor indices = torch::stable::new_empty(queries, {p.queries, k}, ScalarType::Long);
  if (p.queries == 0 || k == 0) return {scores, indices};
  const int64_t group = std::min(p.queries, kCosineGroup);
  const int64_t blocks = (p.rows + kCosineRows - 1) / kCosineRows;
  const int64_t work = grain_for(blocks, p.rows * p.features * group / 16);
  const int64_t segments =
      std::max<int64_t>(std::min<int64_t>(torch::stable::get_num_threads(), blocks / work), 1);
  const int64_t padded = cosine_panels(group) * kCosinePanel;
  Tensor packed = torch::stable::new_empty(queries, {padded * p.features}, ScalarType::Float);
  Tensor inverses = torch::stable::new_empty(queries, {padded}, ScalarType::Double);
  Tensor keys = torch::stable::new_empty(queries, {segments * group * k}, ScalarType::Long);
  const int64_t words = cosine_topk_cpu_pairs(p) ? (p.features + 1) / 2 : 0;
  Tensor pairs = torch::stable::new_empty(queries, {padded * words}, ScalarType::Float);
  Tensor exponents = torch::stable::new_empty(queries, {cosine_panels(group)}, ScalarType::Int);
  const CosineQueries buffers{static_cast<float*>(packed.mutable_data_ptr()),
                              static_cast<double*>(inverses.mutable_data_ptr()),
                              static_cast<float*>(pairs.mutable_data_ptr()),
                              static_cast<int32_t*>(exponents.mutable_data_ptr())};
  const int64_t total = p.queries;
  const char* first = static_cast<const char*>(p.query_data);
  for (int64_t begin = 0; begin < total; begin += group) {
    p.queries = std::min(group, total - begin);
    p.query_data = first + begin * p.query_stride * size_of(p.query_dtype);
    cosine_topk_group(p, buffers, static_cast<uint64_t*>(keys.mutable_data_ptr()), segments,
                      static_cast<float*>(scores.mutable_data_ptr()) + begin * k,
                      static_cast<int64_t*>(indices.mutable_data_ptr()) + begin * k);
  }
  return {scores, indices};
}

Tensor run_kl_divergence(KlProblem problem, const Tensor& student) {
  Tensor out = torch::stable::new_empty(student, {problem.rows}, ScalarType::Float);
  problem.out = static_cast<float*>(out.mutable_data_ptr());
  // Four exponentials per entry with the gradient, two without, about ten operations each.
  const int64_t work = problem.rows * problem.vocabulary * (problem.gradient ? 4 : 2);
  parallel_for(
      0, problem.rows, grain_for(problem.rows, work),
      [&](int64_t begin, int64_t end) { kl_divergence_cpu(problem, begin, end); });
  return out;
}

Tensor kl_divergence(Tensor student, Tensor teacher) {
  return run_kl_divergence(parse_kl("kl_divergence", student, teacher), student);
}

Tensor kl_divergence_(Tensor student, Tensor teacher, Tensor weight) {
  return run_kl_divergence(parse_kl_in_place(student, teacher, weight), student);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gradsafe, CPU, m) {
  m.impl("moments", TORCH_BOX(&moments));
  m.impl("wgrad_moments", TORCH_BOX(&wgrad_moments));
  m.impl("grouped_wgrad_moments", TORCH_BOX(&grouped_wgrad_moments));
  m.impl("cosine_topk", TORCH_BOX(&cosine_topk));
  m.impl("kl_divergence", TORCH_BOX(&kl_divergence));
  m.impl("kl_divergence_", TORCH_BOX(&kl_divergence_));
}

}  // namespace gradsafe

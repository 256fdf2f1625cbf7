// The Python module of facts: how the package was built and what this machine can run. It takes no
// tensors (torch.compile could not see through it); tensors go through the dispatcher.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cpu/isa.h"
#include "cuda_stream.h"
#include "gradsafe/launch_log.h"
#include "gradsafe/moments.h"
#include "gradsafe/status.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = GRADSAFE_COMPILER;
  info["torch_built_with"] = GRADSAFE_TORCH_VERSION;
  info["torch_target"] = GRADSAFE_TORCH_TARGET;
  info["cuda"] = bool(GRADSAFE_CUDA_BUILT);
  info["cuda_compiler"] = GRADSAFE_CUDA_COMPILER;
  info["cuda_archs"] = GRADSAFE_CUDA_ARCH_LIST;
  info["cuda_reason"] = GRADSAFE_CUDA_REASON;
  return info;
}

py::dict plan_moments(int64_t rows, int64_t cols, int axis, int num_refs) {
  gradsafe::MomentsProblem problem{};
  problem.axis = static_cast<gradsafe::Axis>(axis);
  problem.num_refs = num_refs;
  gradsafe::MomentsTask task{};
  task.rows = rows;
  task.cols = cols;
  task.grad_stride = cols;
  for (int64_t& stride : task.ref_strides) stride = cols;
  const gradsafe::MomentsTiling tiling = gradsafe::tile_moments_cpu(problem, task);
  py::dict plan;
  plan["rows"] = tiling.rows;
  plan["cols"] = tiling.cols;
  plan["tile_rows"] = tiling.tile_rows;
  plan["tile_cols"] = tiling.tile_cols;
  plan["row_blocks"] = tiling.row_blocks;
  plan["col_strips"] = tiling.col_strips;
  plan["workspace_bytes"] = 8 * gradsafe::moments_cpu_workspace(problem, tiling);
  return plan;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled backend of gradsafe; tensor operators live in torch.ops.gradsafe.";
  m.def("build_info", &build_info, "Compilers, targets and whether CUDA kernels are inside.");
  m.def("cpu_isa", [] { return gradsafe::isa_name(gradsafe::current_isa()); },
        "Instruction set of the CPU kernels in use.");
  m.def("cpu_isas", &gradsafe::available_isas,
        "Instruction sets this build and machine can run, best first.");
  m.def("has_bf16_pairs", &gradsafe::has_bf16_pairs,
        "Whether the kernels in use multiply two bfloat16 tokens at a time (AVX512_BF16).");
  m.def("set_cpu_isa", &gradsafe::set_isa, py::arg("name"),
        "Use 'scalar', 'avx2', 'avx512' or 'auto' from now on.");
  m.def("has_cuda_stream", [] { return gradsafe::cuda_stream_shim() != nullptr; },
        "Whether the running PyTorch can name its current CUDA stream.");
  m.def("cuda_versions", [] {
          const gradsafe::CudaVersions found = gradsafe::cuda_versions();
          return py::make_tuple(found.driver, found.runtime);
        }, "CUDA versions of the driver and of the linked runtime, 13000 for 13.0; 0 for none.");
  m.def("set_launch_log", &gradsafe::set_launch_log, py::arg("on"),
        "Start an empty log of launched CUDA kernels, or stop it. For tests.");
  m.def("launch_log", &gradsafe::take_launch_log,
        "Names of the CUDA kernels launched since the last call, while the log was on.");
  m.def("plan_moments", &plan_moments, py::arg("rows"), py::arg("cols"), py::arg("axis"),
        py::arg("num_refs"), "How the CPU kernels cut one contiguous matrix.");
  m.def("status_text", &gradsafe::status_text, py::arg("code"), py::arg("cuda") = 0,
        "Message of a launcher's status.");
}

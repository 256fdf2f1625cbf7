// Which kernels the process launched, by name with template arguments, and the versions of the CUDA
// driver and runtime. For tests and reports; the log is off unless a test switches it on.
#pragma once

#include <string>
#include <vector>

namespace gradsafe {

// Starts an empty log, or stops it.
void set_launch_log(bool on);
// Names in the order of the launches since the last call of either function.
std::vector<std::string> take_launch_log();

// As CUDA counts them, 13000 for 13.0. The driver's is 0 where none is installed; both are 0 in a
// build without CUDA kernels.
struct CudaVersions { int driver = 0, runtime = 0; };
CudaVersions cuda_versions();

}  // namespace gradsafe

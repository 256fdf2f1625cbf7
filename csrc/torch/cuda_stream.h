// The current CUDA stream of PyTorch, without linking its CUDA library.
#pragma once

#include <dlfcn.h>

#include <cstdint>

namespace gradsafe {

using CudaStreamShim = int32_t (*)(int32_t device_index, void** stream);

// The shim lives in libtorch_cuda, which a CPU build of PyTorch lacks. A weak symbol would not do:
// PyTorch loads its libraries locally, so the linker would never find the definition. Null if the
// library is not in the process.
inline CudaStreamShim cuda_stream_shim() {
  static const CudaStreamShim shim = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<CudaStreamShim>(symbol);
  }();
  return shim;
}

}  // namespace gradsafe

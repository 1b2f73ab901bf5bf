#pragma once

namespace pybind11 {
class module_;
}

namespace mosa {

// Adds adapter_cuda_forward, adapter_cuda_backward and adapter_cuda_workspace to the Python module, where CUDA kernels
// are built.
void bind_adapter_cuda(pybind11::module_& m);

}  // namespace mosa

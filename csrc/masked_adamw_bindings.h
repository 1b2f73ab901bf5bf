#pragma once

namespace pybind11 {
class module_;
}

namespace mosa {

// Adds masked_adamw_cuda, where it is built, to the Python module, and how many tensors small and large launches take.
void bind_masked_adamw(pybind11::module_& m);

}  // namespace mosa

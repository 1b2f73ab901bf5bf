#pragma once

namespace pybind11 {
class module_;
}

namespace mosa {

// Adds masked_adamw_cuda to the Python module where it is built.
void bind_masked_adamw(pybind11::module_& m);

}  // namespace mosa

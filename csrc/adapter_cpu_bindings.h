#pragma once

namespace pybind11 {
class module_;
}

namespace mosa {

// Adds adapter_cpu_forward and adapter_cpu_backward to the Python module.
void bind_adapter_cpu(pybind11::module_& m);

}  // namespace mosa

#pragma once

namespace pybind11 {
class module_;
}

namespace mosa {

// Adds split_cpu and, where it is built, split_cuda to the Python module.
void bind_split(pybind11::module_& m);

}  // namespace mosa

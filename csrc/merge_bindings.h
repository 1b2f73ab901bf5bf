#pragma once

namespace pybind11 {
class module_;
}

namespace mosa {

// Adds MergeAdapter, merge_cpu and, where it is built, merge_cuda to the Python module.
void bind_merge(pybind11::module_& m);

}  // namespace mosa

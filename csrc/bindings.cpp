// The Python module: integers in, error codes turned into exceptions, nothing else. Each operator binds itself.
#include <pybind11/pybind11.h>

#include "adapter_cpu_bindings.h"
#include "adapter_cuda_bindings.h"
#include "build_info.h"
#include "masked_adamw_bindings.h"
#include "merge_bindings.h"
#include "split_bindings.h"
#ifdef MOSA_WITH_CUDA
#include "cuda_device.h"
#endif

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of mosa_kernels; free of PyTorch headers, called with addresses and sizes.";
  py::dict info;
  info["version"] = mosa::build_info::kVersion;
  info["compiler"] = mosa::build_info::kCompiler;
  info["cuda_toolkit"] = mosa::build_info::kCudaToolkit;
  info["cuda_architectures"] = mosa::build_info::kCudaArchitectures;
  m.attr("build_info") = info;
#ifdef MOSA_WITH_CUDA
  m.def("cuda_driver_version", &mosa::cuda_driver_version);
#endif
  mosa::bind_merge(m);
  mosa::bind_split(m);
  mosa::bind_masked_adamw(m);
  mosa::bind_adapter_cpu(m);
  mosa::bind_adapter_cuda(m);
}

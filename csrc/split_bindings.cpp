#include "split_bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "launch_error.h"
#include "split.h"
#include "status.h"
#ifdef MOSA_WITH_CUDA
#include "cuda_device.h"
#endif

namespace py = pybind11;

namespace mosa {
namespace {

// rows, columns, experts, units, side, line_per_row, line_per_column, unit_per_row, unit_per_column
using Layout = std::array<int32_t, 9>;

SplitParams split_params(uintptr_t owner, uintptr_t seed_address, int64_t seed, const Layout& layout) {
  SplitParams params = {};
  params.owner = reinterpret_cast<uint8_t*>(owner);
  params.seed = reinterpret_cast<const int64_t*>(seed_address);
  params.seed_value = seed;
  params.rows = layout[0];
  params.columns = layout[1];
  params.experts = layout[2];
  params.units = layout[3];
  params.side = layout[4];
  params.line_per_row = layout[5];
  params.line_per_column = layout[6];
  params.unit_per_row = layout[7];
  params.unit_per_column = layout[8];
  return params;
}

void check(const char* name, const SplitParams& params, int code) {
  if (code == kOk) return;
  fail(std::string(name) + " of [" + std::to_string(params.rows) + ", " + std::to_string(params.columns) + "] into " +
           std::to_string(params.experts) + " experts by " + std::to_string(params.units) + " units",
       code);
}

}  // namespace

void bind_split(py::module_& m) {
  m.def(
      "split_cpu",
      [](uintptr_t owner, int64_t seed, const Layout& layout, int threads) {
        py::gil_scoped_release no_gil;
        const SplitParams params = split_params(owner, 0, seed, layout);
        check("split_cpu", params, split_cpu(params, threads));
      },
      py::arg("owner"), py::arg("seed"), py::arg("layout"), py::arg("threads"));
#ifdef MOSA_WITH_CUDA
  m.def(
      "split_cuda",
      [](uintptr_t owner, uintptr_t seed_address, int64_t seed, const Layout& layout, int device, uintptr_t stream) {
        py::gil_scoped_release no_gil;
        const DeviceGuard guard(device);
        if (guard.error() != 0) fail("split_cuda on device " + std::to_string(device), guard.error());
        const SplitParams params = split_params(owner, seed_address, seed, layout);
        check("split_cuda", params, split_cuda(params, reinterpret_cast<void*>(stream)));
      },
      py::arg("owner"), py::arg("seed_address"), py::arg("seed"), py::arg("layout"), py::arg("device"),
      py::arg("stream"));
#endif
}

}  // namespace mosa

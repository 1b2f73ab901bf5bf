#include "merge_bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "launch_error.h"
#include "merge.h"
#include "status.h"
#ifdef MOSA_WITH_CUDA
#include "cuda_device.h"
#endif

namespace py = pybind11;

namespace mosa {
namespace {

using Address = uintptr_t;                         // Tensor.data_ptr(), 0 for None
using Vector = std::tuple<Address, int>;           // address, dtype code
using Matrix = std::tuple<Address, int64_t, int>;  // address, elements between rows, dtype code

const void* input(Address address) { return reinterpret_cast<const void*>(address); }
void* output(Address address) { return reinterpret_cast<void*>(address); }

int32_t narrow(int64_t value, const char* name) {
  if (value < 0 || value > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument(std::string(name) + ": expected 0 to 2^31 - 1, got " + std::to_string(value));
  }
  return static_cast<int32_t>(value);
}

uint8_t dtype_code(int code) {
  if (code < 0 || code >= kDTypeCount) throw std::invalid_argument("dtype: unknown code " + std::to_string(code));
  return static_cast<uint8_t>(code);
}

MergeAdapter merge_adapter(int64_t rank, int64_t width, int64_t experts, Matrix w_down, Matrix w_down_init,
                           Vector b_down, Vector gamma, Vector beta, Matrix w_up, Matrix b_up, Vector scale,
                           float scale_value, float up_factor, float down_factor, Address out_w_down,
                           Address out_b_down, Address out_w_up, Address out_b_up, int out_dtype) {
  MergeAdapter a = {};
  a.rank = narrow(rank, "rank");
  a.width = narrow(width, "width");
  a.experts = narrow(experts, "experts");
  const auto matrix = [](const Matrix& from, const char* name, const void** data, int32_t* stride, uint8_t* dtype) {
    *data = input(std::get<0>(from));
    *stride = narrow(std::get<1>(from), name);
    *dtype = dtype_code(std::get<2>(from));
  };
  const auto vector = [](const Vector& from, const void** data, uint8_t* dtype) {
    *data = input(std::get<0>(from));
    *dtype = dtype_code(std::get<1>(from));
  };
  matrix(w_down, "w_down stride", &a.w_down, &a.w_down_stride, &a.w_down_dtype);
  matrix(w_down_init, "w_down_init stride", &a.w_down_init, &a.w_down_init_stride, &a.w_down_init_dtype);
  matrix(w_up, "w_up stride", &a.w_up, &a.w_up_stride, &a.w_up_dtype);
  matrix(b_up, "b_up stride", &a.b_up, &a.b_up_stride, &a.b_up_dtype);
  vector(b_down, &a.b_down, &a.b_down_dtype);
  vector(gamma, &a.gamma, &a.gamma_dtype);
  vector(beta, &a.beta, &a.beta_dtype);
  vector(scale, &a.scale, &a.scale_dtype);
  a.scale_value = scale_value;
  a.up_factor = up_factor;
  a.down_factor = down_factor;
  a.out_w_down = output(out_w_down);
  a.out_b_down = output(out_b_down);
  a.out_w_up = output(out_w_up);
  a.out_b_up = output(out_b_up);
  a.out_dtype = dtype_code(out_dtype);
  return a;
}

// Calls `launch` with as many adapters at a time as one parameter block holds.
template <typename Launch>
void merge_in_launches(const std::vector<MergeAdapter>& adapters, const char* name, const Launch& launch) {
  for (size_t first = 0; first < adapters.size(); first += kMaxMergeAdapters) {
    MergeParams params = {};
    params.count = static_cast<int32_t>(std::min(adapters.size() - first, static_cast<size_t>(kMaxMergeAdapters)));
    std::copy_n(adapters.begin() + static_cast<std::ptrdiff_t>(first), params.count, params.adapters);
    const int code = launch(params);
    if (code != kOk) {
      const MergeAdapter& a = params.adapters[0];
      fail(std::string(name) + " of " + std::to_string(params.count) + " adapters, the first with w_down [" +
               std::to_string(a.rank) + ", " + std::to_string(a.width) + "],",
           code);
    }
  }
}

}  // namespace

void bind_merge(py::module_& m) {
  py::class_<MergeAdapter>(m, "MergeAdapter", py::module_local())
      .def(py::init(&merge_adapter), py::kw_only(), py::arg("rank"), py::arg("width"), py::arg("experts"),
           py::arg("w_down"), py::arg("w_down_init"), py::arg("b_down"), py::arg("gamma"), py::arg("beta"),
           py::arg("w_up"), py::arg("b_up"), py::arg("scale"), py::arg("scale_value"), py::arg("up_factor"),
           py::arg("down_factor"), py::arg("out_w_down"), py::arg("out_b_down"), py::arg("out_w_up"),
           py::arg("out_b_up"), py::arg("out_dtype"));
  m.attr("adapters_per_launch") = kMaxMergeAdapters;
  m.def(
      "merge_cpu",
      [](const std::vector<MergeAdapter>& adapters, int threads) {
        py::gil_scoped_release no_gil;
        merge_in_launches(adapters, "merge_cpu", [&](const MergeParams& params) { return merge_cpu(params, threads); });
      },
      py::arg("adapters"), py::arg("threads"));
#ifdef MOSA_WITH_CUDA
  m.def(
      "merge_cuda",
      [](const std::vector<MergeAdapter>& adapters, int device, uintptr_t stream) {
        py::gil_scoped_release no_gil;
        const DeviceGuard guard(device);
        if (guard.error() != 0) fail("merge_cuda on device " + std::to_string(device), guard.error());
        merge_in_launches(adapters, "merge_cuda", [&](const MergeParams& params) {
          return merge_cuda(params, reinterpret_cast<void*>(stream));
        });
      },
      py::arg("adapters"), py::arg("device"), py::arg("stream"));
#endif
}

}  // namespace mosa

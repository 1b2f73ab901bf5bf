#include "adapter_cuda_bindings.h"

#include <pybind11/pybind11.h>

#ifdef MOSA_WITH_CUDA
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "adapter.h"
#include "binding_rows.h"
#include "cuda_device.h"
#include "launch_error.h"

namespace py = pybind11;

namespace mosa {
namespace {

int32_t narrow(int64_t value) {
  return static_cast<int32_t>(std::min<int64_t>(value, std::numeric_limits<int32_t>::max()));
}

uint32_t drop_threshold(double p) {
  return static_cast<uint32_t>(std::min(static_cast<int64_t>(p * 4294967296.0), int64_t{4294967295}));
}

// tensors: (address, stride, dtype code) of x, residual, w_down, w_down_init, b_down, w_up, b_up, gamma, beta, scale;
// the addresses of assignment and assignment_down; (address, value, groups, is int64) of expert and seed; the addresses
// of the tables of units and tiles, their experts, and the units listed for each.
// sizes: tokens, width, rank, bias_rows, activation, product dtype, add_input, tf32.
// factors: scale, expert_scale, merged_scale, norm_eps, dropout_p.
AdapterParams adapter_params(const py::tuple& tensors, const py::tuple& sizes, const py::tuple& factors) {
  const auto t = integers<44>(tensors, "tensors");
  const auto s = integers<8>(sizes, "sizes");
  AdapterParams p = {};
  AdapterTensor* const described[] = {&p.x,    &p.residual, &p.w_down, &p.w_down_init, &p.b_down,
                                      &p.w_up, &p.b_up,     &p.gamma,  &p.beta,        &p.scale};
  size_t next = 0;
  for (AdapterTensor* tensor : described) {
    tensor->data = address<const void>(t[next]);
    tensor->stride = t[next + 1];
    tensor->dtype = static_cast<uint8_t>(t[next + 2]);
    next += 3;
  }
  p.assignment = address<const uint8_t>(t[next]);
  p.assignment_down = address<const uint8_t>(t[next + 1]);
  next += 2;
  for (AdapterGroups* groups : {&p.expert, &p.seed}) {
    groups->data = address<const void>(t[next]);
    groups->value = t[next + 1];
    groups->groups = narrow(t[next + 2]);
    groups->is_int64 = t[next + 3] != 0;
    next += 4;
  }
  p.owned = {address<const int16_t>(t[next]), address<const uint16_t>(t[next + 1]), narrow(t[next + 2]),
             narrow(t[next + 3])};
  p.tokens = narrow(s[0]);
  p.width = narrow(s[1]);
  p.rank = narrow(s[2]);
  p.bias_rows = narrow(s[3]);
  p.activation = static_cast<uint8_t>(s[4]);
  p.product_dtype = static_cast<uint8_t>(s[5]);
  p.add_input = s[6] != 0;
  p.tf32 = s[7] != 0;
  if (factors.size() != 5) throw std::invalid_argument("factors: expected 5 numbers");
  p.scale_value = factors[0].cast<float>();
  p.expert_scale = factors[1].cast<float>();
  p.merged_scale = factors[2].cast<float>();
  p.norm_eps = factors[3].cast<float>();
  const double dropout_p = factors[4].cast<double>();
  p.keep_scale = static_cast<float>(1.0 / (1.0 - dropout_p));
  p.drop_threshold = drop_threshold(dropout_p);
  return p;
}

std::string shape_of(const AdapterParams& p) {
  return "x [" + std::to_string(p.tokens) + ", " + std::to_string(p.width) + "], w_down [" + std::to_string(p.rank) +
         ", " + std::to_string(p.width) + "],";
}

// Calls `launch` with the device current and without the interpreter's lock; a failure becomes an exception that names
// launch, shape and cause.
template <typename Launch>
void run(const char* name, const AdapterParams& params, int device, const Launch& launch) {
  int code;
  {
    const py::gil_scoped_release no_gil;
    const DeviceGuard guard(device);
    code = guard.error() != 0 ? guard.error() : launch();
  }
  if (code != 0) fail(std::string(name) + " on device " + std::to_string(device) + " of " + shape_of(params), code);
}

// grad_out (address, stride, dtype code), mean, rstd; (address, dtype code) of the gradients of x, w_down, b_down,
// w_up, b_up, gamma, beta, scale; activity and its rows; multiprocessors; workspace and its bytes; one_launch.
AdapterBackward adapter_gradients(const py::tuple& from) {
  const auto g = integers<27>(from, "gradients");
  AdapterBackward b = {};
  b.grad_out = {address<const void>(g[0]), g[1], static_cast<uint8_t>(g[2]), false};
  b.mean = address<const float>(g[3]);
  b.rstd = address<const float>(g[4]);
  AdapterGradient* const gradients[] = {&b.x, &b.w_down, &b.b_down, &b.w_up, &b.b_up, &b.gamma, &b.beta, &b.scale};
  size_t next = 5;
  for (AdapterGradient* gradient : gradients) {
    gradient->data = address<void>(g[next]);
    gradient->dtype = static_cast<uint8_t>(g[next + 1]);
    next += 2;
  }
  b.activity = address<float>(g[next]);
  b.activity_rows = narrow(g[next + 1]);
  b.multiprocessors = narrow(g[next + 2]);
  b.workspace = address<void>(g[next + 3]);
  b.workspace_bytes = g[next + 4];
  b.one_launch = g[next + 5] != 0;
  return b;
}

}  // namespace

void bind_adapter_cuda(py::module_& m) {
  m.def(
      "adapter_cuda_forward",
      [](const py::tuple& tensors, const py::tuple& sizes, const py::tuple& factors, const py::tuple& outputs,
         int device, uintptr_t stream) {
        const AdapterParams p = adapter_params(tensors, sizes, factors);
        const auto o = integers<3>(outputs, "outputs");
        const AdapterForward forward = {address<void>(o[0]), address<float>(o[1]), address<float>(o[2]), false};
        run("adapter_forward", p, device, [&] { return adapter_forward(p, forward, reinterpret_cast<void*>(stream)); });
      },
      "outputs: out, mean, rstd; see adapter.h");
  m.def(
      "adapter_cuda_workspace",
      [](const py::tuple& tensors, const py::tuple& sizes, const py::tuple& factors, const py::tuple& gradients) {
        return adapter_backward_workspace(adapter_params(tensors, sizes, factors), adapter_gradients(gradients));
      },
      "Bytes of workspace that adapter_cuda_backward needs for these gradients.");
  m.def(
      "adapter_cuda_backward",
      [](const py::tuple& tensors, const py::tuple& sizes, const py::tuple& factors, const py::tuple& gradients,
         int device, uintptr_t stream) {
        const AdapterParams p = adapter_params(tensors, sizes, factors);
        const AdapterBackward backward = adapter_gradients(gradients);
        run("adapter_backward", p, device,
            [&] { return adapter_backward(p, backward, reinterpret_cast<void*>(stream)); });
      },
      "see adapter.h");
  m.def(
      "adapter_cuda_in_one_launch",
      [](const py::tuple& tensors, const py::tuple& sizes, const py::tuple& factors, const py::tuple& gradients,
         int device) {
        const DeviceGuard guard(device);
        return guard.error() == 0 &&
               adapter_backward_in_one_launch(adapter_params(tensors, sizes, factors), adapter_gradients(gradients));
      },
      "Whether adapter_cuda_backward takes one launch over tokens and weights, as `gradients` asks it to.");
  m.attr("adapter_cuda_load_only") = reinterpret_cast<uintptr_t>(load_only());  // in place of a stream
}

}  // namespace mosa
#else
namespace mosa {

void bind_adapter_cuda(pybind11::module_&) {}

}  // namespace mosa
#endif

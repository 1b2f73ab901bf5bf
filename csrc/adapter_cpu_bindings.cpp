#include "adapter_cpu_bindings.h"

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "adapter_cpu.h"
#include "binding_rows.h"
#include "status.h"

namespace py = pybind11;

namespace mosa {
namespace {

// tensors: (address, dtype code) of x, residual, w_down, w_down_init, b_down, w_up, b_up, gamma, beta; then the
// addresses of assignment, assignment_down, expert, seed. sizes: tokens, width, rank, experts, expert_groups,
// seed_groups, activation, add_input, bf16_products, threads, expert_id, seed_id, instruction_set. Factors: scale,
// expert_scale, merged_scale, norm_eps, dropout_p.
AdapterCpuParams adapter_params(const py::tuple& tensors, const py::tuple& sizes, double scale, double expert_scale,
                                double merged_scale, double norm_eps, double dropout_p) {
  const auto t = integers<22>(tensors, "tensors");
  const auto s = integers<13>(sizes, "sizes");
  AdapterCpuParams p = {};
  CpuTensor* const described[] = {&p.x,    &p.residual, &p.w_down, &p.w_down_init, &p.b_down,
                                  &p.w_up, &p.b_up,     &p.gamma,  &p.beta};
  size_t next = 0;
  for (CpuTensor* tensor : described) {
    tensor->data = address<const void>(t[next]);
    tensor->dtype = static_cast<uint8_t>(t[next + 1]);
    next += 2;
  }
  p.assignment = address<const uint8_t>(t[next]);
  p.assignment_down = address<const uint8_t>(t[next + 1]);
  p.expert = address<const int64_t>(t[next + 2]);
  p.seed = address<const int64_t>(t[next + 3]);
  p.tokens = s[0];
  p.width = static_cast<int32_t>(s[1]);
  p.rank = static_cast<int32_t>(s[2]);
  p.experts = static_cast<int32_t>(s[3]);
  p.expert_groups = static_cast<int32_t>(s[4]);
  p.seed_groups = static_cast<int32_t>(s[5]);
  p.activation = static_cast<uint8_t>(s[6]);
  p.add_input = s[7] != 0;
  p.bf16_products = s[8] != 0;
  p.threads = static_cast<int32_t>(s[9]);
  p.expert_id = s[10];
  p.seed_id = s[11];
  p.instruction_set = static_cast<uint8_t>(s[12]);
  p.scale = static_cast<float>(scale);
  p.expert_scale = static_cast<float>(expert_scale);
  p.merged_scale = static_cast<float>(merged_scale);
  p.norm_eps = static_cast<float>(norm_eps);
  p.dropout_p = dropout_p;
  return p;
}

const char* const kInstructionSets[kInstructionSetCount] = {"portable", "avx2", "avx512", "avx512_bf16"};

void require_ok(int code, const char* name) {
  if (code == kOk) return;
  throw std::runtime_error(std::string(name) + " failed: " + status_message(code));
}

}  // namespace

void bind_adapter_cpu(py::module_& m) {
  m.def(
      "adapter_cpu_instruction_sets",
      [] {
        py::dict found;
        for (int set = 0; set < kInstructionSetCount; ++set) {
          if (adapter_cpu_has(static_cast<InstructionSet>(set))) found[kInstructionSets[set]] = set;
        }
        return found;
      },
      "Those that this CPU and this build have, by name, with their numbers.");
  m.def(
      "adapter_cpu_fastest_instruction_set",
      [](bool bf16_products) { return kInstructionSets[adapter_cpu_fastest(bf16_products)]; }, py::arg("bf16_products"),
      "The name of the one that calls run with, in bf16 or in fp32.");
  m.def(
      "adapter_cpu_forward",
      [](const py::tuple& tensors, const py::tuple& sizes, double scale, double expert_scale, double merged_scale,
         double norm_eps, double dropout_p, const py::tuple& outputs) {
        const AdapterCpuParams p =
            adapter_params(tensors, sizes, scale, expert_scale, merged_scale, norm_eps, dropout_p);
        const auto o = integers<3>(outputs, "outputs");
        int code;
        {
          const py::gil_scoped_release no_gil;
          code = adapter_cpu_forward(p, {address<void>(o[0]), address<float>(o[1]), address<float>(o[2])});
        }
        require_ok(code, "adapter_cpu_forward");
      },
      "out, mean, rstd; see adapter_cpu.h");
  m.def(
      "adapter_cpu_backward",
      [](const py::tuple& tensors, const py::tuple& sizes, double scale, double expert_scale, double merged_scale,
         double norm_eps, double dropout_p, const py::tuple& gradients) {
        const AdapterCpuParams p =
            adapter_params(tensors, sizes, scale, expert_scale, merged_scale, norm_eps, dropout_p);
        const auto g = integers<11>(gradients, "gradients");
        int code;
        {
          const py::gil_scoped_release no_gil;
          code = adapter_cpu_backward(
              p, {address<const void>(g[0]), address<const float>(g[1]), address<const float>(g[2]),
                  address<void>(g[3]), address<float>(g[4]), address<float>(g[5]), address<float>(g[6]),
                  address<float>(g[7]), address<float>(g[8]), address<float>(g[9]), address<float>(g[10])});
        }
        require_ok(code, "adapter_cpu_backward");
      },
      "grad_out, mean, rstd, then the gradients of x, w_down, b_down, w_up, b_up, gamma, beta, scale; see "
      "adapter_cpu.h");
}

}  // namespace mosa

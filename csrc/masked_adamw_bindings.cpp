#include "masked_adamw_bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "launch_error.h"
#include "masked_adamw.h"
#include "status.h"
#ifdef MOSA_WITH_CUDA
#include "cuda_device.h"
#endif

namespace py = pybind11;

namespace mosa {
namespace {

// Per tensor: param, grad, exp_avg, exp_avg_sq, owner, steps, active (addresses), size, experts, dtype. One flat list
// costs a tenth of what as many Python objects with named fields do.
constexpr size_t kNumbersPerTensor = 10;

uint64_t within(uint64_t value, uint64_t most, const char* name) {
  if (value > most) {
    throw std::invalid_argument(std::string(name) + ": expected at most " + std::to_string(most) + ", got " +
                                std::to_string(value));
  }
  return value;
}

template <typename T>
T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

std::vector<AdamWTensor> adamw_tensors(const std::vector<uint64_t>& numbers) {
  if (numbers.size() % kNumbersPerTensor != 0) {
    throw std::invalid_argument("tensors: expected " + std::to_string(kNumbersPerTensor) + " numbers for each, got " +
                                std::to_string(numbers.size()));
  }
  std::vector<AdamWTensor> tensors(numbers.size() / kNumbersPerTensor);
  const uint64_t* from = numbers.data();
  for (AdamWTensor& t : tensors) {
    t = {};
    t.param = pointer<void>(from[0]);
    t.grad = pointer<const void>(from[1]);
    t.exp_avg = pointer<void>(from[2]);
    t.exp_avg_sq = pointer<void>(from[3]);
    t.owner = pointer<const uint8_t>(from[4]);
    t.steps = pointer<float>(from[5]);
    t.active = pointer<const float>(from[6]);
    t.size = static_cast<uint32_t>(within(from[7], kMaxAdamWEntries, "size"));
    t.experts = static_cast<uint16_t>(within(from[8], kMaxAdamWExperts, "experts"));
    t.dtype = static_cast<uint8_t>(within(from[9], kDTypeCount - 1, "dtype"));
    from += kNumbersPerTensor;
  }
  return tensors;
}

AdamWOptions adamw_options(uintptr_t lr_address, bool lr_is_double, double lr, double beta1, double beta2, double eps,
                           double weight_decay, uintptr_t ticket) {
  AdamWOptions options = {};
  options.lr = pointer<const void>(lr_address);
  options.lr_is_double = lr_is_double;
  options.lr_value = lr;
  options.ticket = pointer<uint32_t>(ticket);
  options.weight_decay = weight_decay;
  options.beta2 = static_cast<float>(beta2);
  options.one_minus_beta1 = static_cast<float>(1.0 - beta1);
  options.one_minus_beta2 = static_cast<float>(1.0 - beta2);
  options.log_beta1 = static_cast<float>(std::log(beta1));
  options.log_beta2 = static_cast<float>(std::log(beta2));
  options.eps = static_cast<float>(eps);
  return options;
}

[[noreturn]] void fail_on(const char* name, const std::vector<AdamWTensor>& tensors, int code) {
  const std::string first = tensors.empty() ? "" : ", the first of " + std::to_string(tensors[0].size) + " entries";
  fail(std::string(name) + " of " + std::to_string(tensors.size()) + " tensors" + first, code);
}

}  // namespace

void bind_masked_adamw(py::module_& m) {
  m.def(
      "masked_adamw_cpu",
      [](const std::vector<uint64_t>& numbers, double lr, double beta1, double beta2, double eps, double weight_decay,
         int threads) {
        const std::vector<AdamWTensor> tensors = adamw_tensors(numbers);
        py::gil_scoped_release no_gil;
        AdamWParams params = {};
        params.options = adamw_options(0, false, lr, beta1, beta2, eps, weight_decay, 0);
        params.tensors = tensors.data();
        params.count = static_cast<int32_t>(tensors.size());
        const int code = masked_adamw_cpu(params, threads);
        if (code != kOk) fail_on("masked_adamw_cpu", tensors, code);
      },
      py::arg("tensors"), py::kw_only(), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
      py::arg("weight_decay"), py::arg("threads"));
#ifdef MOSA_WITH_CUDA
  m.attr("adamw_tensors_per_launch") =
      py::make_tuple(AdamWTable<kSmallTableBytes>::kCapacity, AdamWTable<kLargeTableBytes>::kCapacity);
  m.def(
      "masked_adamw_cuda",
      [](const std::vector<uint64_t>& numbers, uintptr_t lr_address, bool lr_is_double, double lr, double beta1,
         double beta2, double eps, double weight_decay, uintptr_t ticket, bool large_parameters, int device,
         uintptr_t stream) {
        const std::vector<AdamWTensor> tensors = adamw_tensors(numbers);
        py::gil_scoped_release no_gil;
        AdamWParams params = {};
        params.options = adamw_options(lr_address, lr_is_double, lr, beta1, beta2, eps, weight_decay, ticket);
        params.tensors = tensors.data();
        params.count = static_cast<int32_t>(tensors.size());
        params.large_parameters = large_parameters;
        const DeviceGuard guard(device);
        if (guard.error() != 0) fail("masked_adamw_cuda on device " + std::to_string(device), guard.error());
        const int code = masked_adamw_cuda(params, reinterpret_cast<void*>(stream));
        if (code != kOk) fail_on("masked_adamw_cuda", tensors, code);
      },
      py::arg("tensors"), py::kw_only(), py::arg("lr_address"), py::arg("lr_is_double"), py::arg("lr"),
      py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"), py::arg("ticket"),
      py::arg("large_parameters"), py::arg("device"), py::arg("stream"));
#endif
}

}  // namespace mosa

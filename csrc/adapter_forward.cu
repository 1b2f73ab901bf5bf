#include "adapter_served.h"

namespace mosa {

namespace {

struct Forward {
  const AdapterForward& out;
  void* stream;

  template <bool kListed>
  int at(const AdapterParams& p) const {
    switch (p.product_dtype) {
      case kFloat16:
        return adapter_forward_in<__half, kListed>(p, out, stream);
      case kBFloat16:
        return adapter_forward_in<__nv_bfloat16, kListed>(p, out, stream);
      default:
        return adapter_forward_in<float, kListed>(p, out, stream);
    }
  }
};

}  // namespace

int prepare_adapter(AdapterParams* params) {
  AdapterParams& p = *params;
  if (p.tokens <= 0 || p.width <= 0 || p.rank <= 0 || p.bias_rows < 0) return kNegativeSize;
  if (p.width > kMaxAdapterWidth || p.rank > kMaxAdapterRank) return kTooLarge;
  if (p.x.data == nullptr || p.w_down.data == nullptr || p.w_up.data == nullptr) return kMissingPointer;
  if ((p.assignment_down == nullptr) != (p.w_down_init.data == nullptr)) return kMissingPointer;
  if (p.activation >= kAdapterActivationCount) return kUnknownActivation;
  if (p.product_dtype >= kDTypeCount) return kUnknownDType;
  AdapterTensor* const tensors[] = {&p.x,    &p.residual, &p.w_down, &p.w_down_init, &p.b_down,
                                    &p.w_up, &p.b_up,     &p.gamma,  &p.beta,        &p.scale};
  for (AdapterTensor* tensor : tensors) {
    if (tensor->data == nullptr) continue;
    if (tensor->dtype >= kDTypeCount) return kUnknownDType;
    tensor->wide = is_wide(tensor->data, tensor->stride, tensor->dtype);
  }
  for (AdapterGroups* groups : {&p.expert, &p.seed}) {
    if (groups->groups <= 0 || p.tokens % groups->groups != 0) return kUnequalGroups;
    groups->tokens = p.tokens / groups->groups;
  }
  const auto wide_owners = [](const uint8_t* data, int row) {
    return reinterpret_cast<uintptr_t>(data) % kVector == 0 && row % kVector == 0;
  };
  if (p.assignment == nullptr) p.owned = {};
  if (p.owned.experts < 0) return kNegativeSize;
  if (lists_units(p)) {
    const int listed = p.owned.listed;
    if ((listed != kFewListed && listed != kMostListed) || listed > padded_rank(p.rank)) return kTooLarge;
  }
  p.served = kServeAll;
  p.wide_assignment = wide_owners(p.assignment, p.rank);
  p.wide_assignment_down = wide_owners(p.assignment_down, p.width);
  return kOk;
}

int adapter_forward(const AdapterParams& params, const AdapterForward& forward, void* stream) {
  AdapterParams p = params;
  const int status = prepare_adapter(&p);
  if (status != kOk) return status;
  if (forward.out == nullptr) return kMissingPointer;
  if (p.gamma.data != nullptr && (forward.mean == nullptr || forward.rstd == nullptr)) return kMissingPointer;
  AdapterForward out = forward;
  out.wide_out = is_wide(out.out, p.width, p.x.dtype);
  return for_served(p, Forward{out, stream});
}

}  // namespace mosa

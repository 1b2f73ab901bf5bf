// Error codes of launchers. Zero is success, positive codes are those of CUDA (cudaError_t), negative ones are ours.
#pragma once

namespace mosa {

enum Status : int {
  kOk = 0,
  kTooManyAdapters = -1,
  kNegativeSize = -2,
  kUnknownDType = -3,
  kMissingPointer = -4,
  kUnknownExpert = -5,
  kNotBuilt = -6,
  kOutOfMemory = -7,
  kUnknownUnit = -8,
  kUnknownLine = -9,
  kTooLarge = -10,
  kUnknownActivation = -11,
  kUnequalGroups = -12,
  kOtherDType = -13,
  kSmallWorkspace = -14,
};

inline const char* status_message(int code) {
  switch (code) {
    case kOk:
      return "success";
    case kTooManyAdapters:
      return "more adapters than one launch takes";
    case kNegativeSize:
      return "a negative size";
    case kUnknownDType:
      return "an unknown dtype code";
    case kMissingPointer:
      return "a required tensor without an address";
    case kUnknownExpert:
      return "an expert that does not exist";
    case kNotBuilt:
      return "not built by this compiler";
    case kOutOfMemory:
      return "out of memory";
    case kUnknownUnit:
      return "a unit beyond those of its line";
    case kUnknownLine:
      return "lines that are neither rows nor columns";
    case kTooLarge:
      return "a size beyond what the kernels take";
    case kUnknownActivation:
      return "an unknown activation";
    case kUnequalGroups:
      return "groups that do not divide the tokens";
    case kOtherDType:
      return "a gradient of another dtype than x";
    case kSmallWorkspace:
      return "a workspace that is missing or too small";
    default:
      return "an unknown error code";
  }
}

}  // namespace mosa

// Turns a launcher's error code into an exception.
#pragma once

#include <stdexcept>
#include <string>

#include "status.h"
#ifdef MOSA_WITH_CUDA
#include "cuda_device.h"
#endif

namespace mosa {

// `launch` names the launch and its shape.
[[noreturn]] inline void fail(const std::string& launch, int code) {
  std::string cause = status_message(code);
#ifdef MOSA_WITH_CUDA
  if (code > 0) cause = std::string(cuda_error_name(code)) + ", " + cuda_error_message(code);
#endif
  throw std::runtime_error(launch + " failed: " + cause + " (code " + std::to_string(code) + ")");
}

}  // namespace mosa

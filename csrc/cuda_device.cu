#include "cuda_device.h"

#include <cuda_runtime.h>

namespace mosa {

DeviceGuard::DeviceGuard(int device) {
  error_ = cudaGetDevice(&previous_);
  if (error_ == cudaSuccess && previous_ != device) error_ = cudaSetDevice(device);
}

DeviceGuard::~DeviceGuard() {
  if (error_ == cudaSuccess) cudaSetDevice(previous_);
}

const char* cuda_error_name(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }

const char* cuda_error_message(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace mosa

// What the bindings need to know of the CUDA runtime.
#pragma once

namespace mosa {

// Makes `device` current for its lifetime. PyTorch has its own copy of the runtime, so its choice is passed along.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  int error() const { return error_; }  // cudaError_t

 private:
  int previous_ = -1;
  int error_ = 0;
};

const char* cuda_error_name(int error);
const char* cuda_error_message(int error);

// The CUDA version of the driver, such as 13000; 0 without a driver.
int cuda_driver_version();

}  // namespace mosa

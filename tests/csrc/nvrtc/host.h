// Included before each .cu file that NVRTC compiles.
//
// NVRTC knows no host code: asked to, it takes the launchers for device functions, and this gives them what they call.
// So the kernels that they launch, templates among them, are those that nvcc compiles, from unchanged sources.
#pragma once

#include <cuda_runtime.h>

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t*, void (*kernel)(Parameters...), Arguments&&...) {
  return kernel != nullptr ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int) {
  return kernel != nullptr ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}

template <typename... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*kernel)(Parameters...)) {
  return kernel != nullptr ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}

template <typename... Parameters>
cudaError_t cudaOccupancyMaxActiveClusters(int*, void (*kernel)(Parameters...), const cudaLaunchConfig_t*) {
  return kernel != nullptr ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}

inline cudaError_t cudaGetDevice(int*) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

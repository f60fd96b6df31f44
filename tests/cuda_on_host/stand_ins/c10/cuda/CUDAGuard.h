// Stands in for torch's header of this name: csrc/cuda/ops.cpp on CPU tensors.
#pragma once

#include <c10/core/Device.h>

#include <optional>

namespace c10::cuda {

// The device of the guard there is.
inline std::optional<Device>& guarded() {
  static std::optional<Device> device;
  return device;
}

struct CUDAGuard {
  explicit CUDAGuard(Device device) { guarded() = device; }
  ~CUDAGuard() { guarded().reset(); }
};

}  // namespace c10::cuda

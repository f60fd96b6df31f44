// Stands in for torch's header of this name: csrc/cuda/ops.cpp on CPU tensors.
#pragma once

#include <c10/cuda/CUDAGuard.h>
#include <c10/util/Exception.h>

namespace c10::cuda {

struct CUDAStream {
  void* stream() const { return nullptr; }
};

// Kernels are to start on their tensors' device.
inline CUDAStream getCurrentCUDAStream(DeviceIndex index) {
  TORCH_CHECK(guarded() && guarded()->index() == index,
              "a stream is asked for without a guard of its device");
  return {};
}

}  // namespace c10::cuda

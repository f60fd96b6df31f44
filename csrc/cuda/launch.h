// All that differs between a GPU and the host that emulates one, but for single instructions (ptx.cuh): who a
// thread is, the kinds of memory, and how a kernel is started.
//
// Kernels see memory as Global<T> and Shared<T>. On a GPU they are plain pointers; on the host they check
// every access against the buffer that they point into. tests/cuda_on_host has the host's side.
#pragma once

#include <cstdint>

struct Grid {
  unsigned x = 1, y = 1, z = 1;
};

namespace pruned_ops::cuda {
constexpr int64_t kMostBlocks = 2147483647;  // of a grid along x
}

#ifdef __CUDACC__

#include <cstdio>

#define PRUNED_OPS_DEVICE __device__ __forceinline__

namespace pruned_ops::cuda {

template <class T>
using Global = T*;
template <class T>
using Shared = T*;

PRUNED_OPS_DEVICE int thread_index() {
  return static_cast<int>(threadIdx.x);
}
PRUNED_OPS_DEVICE Grid block_index() {
  return {blockIdx.x, blockIdx.y, blockIdx.z};
}

// The block's shared memory, as much as its launch asked for; aligned to 128 bytes.
template <class T>
PRUNED_OPS_DEVICE Shared<T> shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

// Of the current GPU; 0 where that cannot be asked.
inline int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Starts a kernel; returns what is wrong with the launch, or nullptr. An error that an earlier call left
// behind would look like this launch's: it is named as what it is, and stays. More than 48 KiB of shared
// memory are there only for a kernel that asked.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), Grid grid, int threads, int shared_bytes, void* stream,
                   Arguments... arguments) {
  const cudaError_t earlier = cudaPeekAtLastError();
  if (earlier != cudaSuccess) {
    thread_local char message[256];
    std::snprintf(message, sizeof(message), "an earlier CUDA call failed: %s", cudaGetErrorString(earlier));
    return message;
  }
  if (shared_bytes > 48 * 1024) {
    const cudaError_t refused =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (refused != cudaSuccess) return cudaGetErrorString(refused);
  }
  kernel<<<dim3(grid.x, grid.y, grid.z), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      arguments...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pruned_ops::cuda

#else

#define PRUNED_OPS_DEVICE inline
#define __global__
#define __launch_bounds__(...)

#include <algorithm>
#include <cmath>
#include <cstring>

#include "emulator.h"

namespace pruned_ops::cuda {

using std::max;
using std::memcpy;
using std::min;

template <class T>
using Global = emulator::Pointer<T>;
template <class T>
using Shared = emulator::Pointer<T>;

inline int thread_index() {
  return emulator::thread_index();
}
inline Grid block_index() {
  return emulator::block_index();
}

inline int multiprocessors() {
  return emulator::multiprocessors();
}

template <class T>
Shared<T> shared_memory() {
  return emulator::shared_memory<T>();
}

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), Grid grid, int threads, int shared_bytes, void*,
                   Arguments... arguments) {
  emulator::run(grid, threads, shared_bytes, [&] { kernel(arguments...); });
  return nullptr;
}

}  // namespace pruned_ops::cuda

#endif

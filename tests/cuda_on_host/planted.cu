#include "planted.h"

#include "ptx.cuh"

namespace pruned_ops::cuda::planted {
namespace {

__global__ void copy(Global<float> to, Global<const float> from, int count) {
  const int i = static_cast<int>(block_index().x) * 32 + thread_index();
  if (i < count) to[i] = from[i];
}

const char* run_copy(void* const* pointers, const int64_t* numbers) {
  const int count = static_cast<int>(numbers[0]);
  return launch(copy, {static_cast<unsigned>(count + 31) / 32}, 32, 0, nullptr,
                static_cast<float*>(pointers[0]), static_cast<const float*>(pointers[1]), count);
}

}  // namespace

const std::map<std::string, Host>& kernels() {
  static const std::map<std::string, Host> all = {{"copy", run_copy}};
  return all;
}

}  // namespace pruned_ops::cuda::planted

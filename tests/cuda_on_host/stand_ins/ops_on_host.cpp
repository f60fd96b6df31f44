// csrc/cuda/ops.cpp on CPU tensors and emulated kernels: torch.ops.cuda_on_host.
#include <torch/library.h>

#include <cstdint>

#include "cuda/launch.h"
#include "cuda/ops.h"

namespace pruned_ops::cuda {
namespace {

// Kernels may use all memory: which of it they should is tested without torch.
void begin() {
  emulator::Settings settings;
  settings.name = "ops.cpp";
  settings.buffers.push_back({"memory", 0, SIZE_MAX, true});
  emulator::set(std::move(settings));
}

// Kernels started since begin().
int64_t launches() {
  return static_cast<int64_t>(emulator::statistics().size());
}

}  // namespace

TORCH_LIBRARY(cuda_on_host, m) {
  m.def("begin", &begin);
  m.def("launches", &launches);
  m.def("attention", &attention);
  m.def("linear_gelu", &linear_gelu);
  m.def("add_layer_norm", &add_layer_norm);
  m.def("linear_add_layer_norm", &linear_add_layer_norm);
  m.def("embed_layer_norm", &embed_layer_norm);
}

}  // namespace pruned_ops::cuda

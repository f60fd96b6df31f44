// The one file that knows torch's library: it registers a function for each op, and makes the Python module
// that tells what was built.
#ifdef __x86_64__
#include <cpuid.h>
#endif
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include <map>
#include <string>
#include <vector>

#include "cpu/arm_features.h"
#include "cpu/attention.h"
#include "cpu/encoder.h"
#include "cpu/kernels.h"
#include "cpu/layer_norm.h"
#ifdef PRUNED_OPS_HAVE_CUDA
#include <cuda_runtime_api.h>

#include "cuda/ops.h"
#endif

namespace {

// The schemas of the ops that both the CPU and the GPU have.
constexpr const char* kAddLayerNorm =
    "add_layer_norm(Tensor x, Tensor? bias, Tensor residual, Tensor norm_weight, Tensor norm_bias, "
    "float eps) -> Tensor";
constexpr const char* kEmbedLayerNorm =
    "embed_layer_norm(Tensor input_ids, Tensor position_ids, Tensor token_type_ids, Tensor word, "
    "Tensor position, Tensor token_type, Tensor norm_weight, Tensor norm_bias, float eps) -> Tensor";

}  // namespace

TORCH_LIBRARY(pruned_ops_cpu, m) {
  m.def(
      "attention(Tensor qkv, Tensor cu_seqlens, int max_seqlen, int head_dim, Tensor? positions=None, "
      "Tensor? rotary=None, int? window=None, Tensor? position_bias=None, Tensor? position_key=None, "
      "Tensor? position_query=None, Tensor? distance_rows=None) -> Tensor");
  m.def(kAddLayerNorm);
  m.def(kEmbedLayerNorm);
  m.def(
      "encoder(Tensor x, Tensor cu_seqlens, int max_seqlen, Tensor[] weights, int[] widths, int head_dim, "
      "float eps, bool norm_first=False, bool gated=False, Tensor? positions=None, Tensor? rotary=None, "
      "int[]? windows=None, Tensor? position_bias=None, Tensor? final_norm=None, "
      "Tensor? position_keys=None, Tensor? position_queries=None, Tensor? distance_rows=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(pruned_ops_cpu, CPU, m) {
  m.impl("attention", &pruned_ops::cpu::attention);
  m.impl("add_layer_norm", &pruned_ops::cpu::add_layer_norm);
  m.impl("embed_layer_norm", &pruned_ops::cpu::embed_layer_norm);
  m.impl("encoder", &pruned_ops::cpu::encoder);
}

#ifdef PRUNED_OPS_HAVE_CUDA
TORCH_LIBRARY(pruned_ops_cuda, m) {
  m.def("attention(Tensor qkv, Tensor cu_seqlens, int max_seqlen, int head_dim) -> Tensor");
  m.def("linear_gelu(Tensor x, Tensor weight, Tensor bias) -> Tensor");
  m.def(kAddLayerNorm);
  m.def(
      "linear_add_layer_norm(Tensor x, Tensor weight, Tensor bias, Tensor residual, Tensor norm_weight, "
      "Tensor norm_bias, float eps) -> Tensor");
  m.def(kEmbedLayerNorm);
}

TORCH_LIBRARY_IMPL(pruned_ops_cuda, CUDA, m) {
  m.impl("attention", &pruned_ops::cuda::attention);
  m.impl("linear_gelu", &pruned_ops::cuda::linear_gelu);
  m.impl("add_layer_norm", &pruned_ops::cuda::add_layer_norm);
  m.impl("linear_add_layer_norm", &pruned_ops::cuda::linear_add_layer_norm);
  m.impl("embed_layer_norm", &pruned_ops::cuda::embed_layer_norm);
}
#endif

namespace {

// What this file was compiled with and for; it may run with another torch of the same ABI.
pybind11::dict build_info() {
  std::vector<std::string> capabilities = {"DEFAULT"};
#ifdef PRUNED_OPS_HAVE_AVX2
  capabilities.emplace_back("AVX2");
#endif
#ifdef PRUNED_OPS_HAVE_AVX512
  capabilities.emplace_back("AVX512");
#endif
#ifdef PRUNED_OPS_HAVE_AVX512_VNNI
  capabilities.emplace_back("AVX512_VNNI");
#endif
#ifdef PRUNED_OPS_HAVE_AMX_INT8
  capabilities.emplace_back("AMX_INT8");
#endif
#ifdef PRUNED_OPS_HAVE_NEON_DOTPROD
  capabilities.emplace_back("NEON_DOTPROD");
#endif
#ifdef PRUNED_OPS_HAVE_NEON_I8MM
  capabilities.emplace_back("NEON_I8MM");
#endif
#ifdef PRUNED_OPS_HAVE_AVX512_BF16
  capabilities.emplace_back("AVX512_BF16");
#endif
#ifdef PRUNED_OPS_HAVE_AMX_BF16
  capabilities.emplace_back("AMX_BF16");
#endif
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["capabilities"] = capabilities;
  info["cuda"] = pybind11::none();
#ifdef PRUNED_OPS_HAVE_CUDA
  // The macro's value is the list of architectures, as in TORCH_CUDA_ARCH_LIST.
  pybind11::dict cuda;
  cuda["version"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  cuda["architectures"] = PRUNED_OPS_HAVE_CUDA;
  info["cuda"] = cuda;
#endif
  return info;
}

// Those of the other architecture are false.
std::map<std::string, bool> cpu_features() {
  const pruned_ops::ArmFeatures arm = pruned_ops::arm_features();
  std::map<std::string, bool> features = {
      {"avx2", false},        {"fma", false},      {"avx512f", false},  {"avx512_vnni", false},
      {"avx512_bf16", false}, {"amx_bf16", false}, {"amx_int8", false}, {"neon_dotprod", arm.dotprod},
      {"neon_i8mm", arm.i8mm}};
#ifdef __x86_64__
  __builtin_cpu_init();
  features["avx2"] = __builtin_cpu_supports("avx2") != 0;
  features["fma"] = __builtin_cpu_supports("fma") != 0;
  features["avx512f"] = __builtin_cpu_supports("avx512f") != 0;
  features["avx512_vnni"] = __builtin_cpu_supports("avx512vnni") != 0;
  features["avx512_bf16"] = __builtin_cpu_supports("avx512bf16") != 0;
  // Older compilers do not know AMX by name; it is in edx of leaf 7.
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
  __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
  features["amx_bf16"] = (edx >> 22 & 1) != 0;
  features["amx_int8"] = (edx >> 25 & 1) != 0;
#endif
  return features;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "What the C++ extension was built with and what it runs; its ops are torch.ops.pruned_ops_cpu and, "
      "where it was built with CUDA, pruned_ops_cuda.";
  m.def("build_info", &build_info,
        "torch: version built against; compiler; capabilities compiled; "
        "cuda: None, or version and architectures");
  m.def(
      "cpu_capability", [] { return pruned_ops::kernels().capability; },
      "the capability that runs: DEFAULT (on ARM, NEON), AVX2 or AVX512; obeys ATEN_CPU_CAPABILITY");
  m.def(
      "int8_capability", [] { return pruned_ops::int8_kernels().capability; },
      "the capability that int8 weights run with: DEFAULT, AVX2, AVX512_VNNI, AMX_INT8, NEON_DOTPROD or "
      "NEON_I8MM; obeys ATEN_CPU_CAPABILITY");
  m.def(
      "bf16_capability",
      [] {
        const pruned_ops::Bf16Kernels* kernels = pruned_ops::bf16_kernels();
        return kernels == nullptr ? nullptr : kernels->capability;
      },
      "the capability that bf16 weights run with, AVX512_BF16 or AMX_BF16, or None; obeys "
      "ATEN_CPU_CAPABILITY");
  m.def("cpu_features", &cpu_features, "instruction sets of this processor: name -> bool");
}

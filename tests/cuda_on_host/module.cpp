// The kernels' host functions in the emulator, for Python: addresses and sizes in, statistics out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "launch.h"
#include "planted.h"

namespace py = pybind11;

namespace pruned_ops::cuda {
namespace {

using Address = uintptr_t;

const void* in(Address address) {
  return reinterpret_cast<const void*>(address);
}
void* out(Address address) {
  return reinterpret_cast<void*>(address);
}

template <class Value>
Value named(const std::map<std::string, Value>& values, const std::string& name) {
  const auto found = values.find(name);
  if (found == values.end()) throw std::invalid_argument("there is no " + name);
  return found->second;
}

Dtype dtype_of(const std::string& name) {
  return named<Dtype>(
      {{"float32", Dtype::float32}, {"float16", Dtype::float16}, {"bfloat16", Dtype::bfloat16}}, name);
}

void accepted(const char* refusal) {
  if (refusal) throw std::invalid_argument(refusal);
}

// buffers: name, address, bytes and whether the kernel may write there.
void configure(const std::string& name,
               const std::vector<std::tuple<std::string, Address, size_t, bool>>& buffers,
               const std::string& order, uint64_t seed, int multiprocessors, int fault) {
  using emulator::Order;
  emulator::Settings settings;
  settings.name = name;
  for (const auto& [buffer, address, bytes, writable] : buffers)
    settings.buffers.push_back({buffer, address, bytes, writable});
  settings.order = named<Order>(
      {{"ascending", Order::ascending}, {"descending", Order::descending}, {"random", Order::random}}, order);
  settings.seed = seed;
  settings.multiprocessors = multiprocessors;
  emulator::fault = fault;
  emulator::set(std::move(settings));
}

py::list statistics() {
  py::list all;
  for (const emulator::Statistics& launch : emulator::statistics()) {
    py::dict one;
    one["grid"] = py::make_tuple(launch.grid.x, launch.grid.y, launch.grid.z);
    one["threads"] = launch.threads;
    one["shared_bytes"] = launch.shared_bytes;
    one["barriers"] = launch.barriers;
    one["shuffles"] = launch.shuffles;
    one["multiplications"] = launch.multiplications;
    one["matrix_loads"] = launch.matrix_loads;
    one["bank_conflicts"] = launch.bank_conflicts;
    one["async_copies"] = launch.async_copies;
    all.append(one);
  }
  return all;
}

void run_planted(const std::string& name, const std::vector<Address>& addresses,
                 const std::vector<int64_t>& numbers) {
  std::vector<void*> pointers;
  for (const Address address : addresses) pointers.push_back(out(address));
  accepted(named(planted::kernels(), name)(pointers.data(), numbers.data()));
}

void run_attention(Address qkv, Address cu_seqlens, Address result, int tokens, int batch, int num_heads,
                   int head_dim, int max_seqlen, int64_t stride_qkv, const std::string& dtype) {
  accepted(attention({in(qkv), static_cast<const int32_t*>(in(cu_seqlens)), out(result), tokens, batch,
                      num_heads, head_dim, max_seqlen, stride_qkv, dtype_of(dtype)},
                     nullptr));
}

// x, weight, bias, out, tokens, in, width, stride_x, stride_weight, dtype
using LinearTuple =
    std::tuple<Address, Address, Address, Address, int, int, int, int64_t, int64_t, std::string>;

Linear linear_of(const LinearTuple& tuple) {
  const auto& [x, weight, bias, result, tokens, inputs, width, stride_x, stride_weight, dtype] = tuple;
  return {in(x),  in(weight), in(bias), out(result),   tokens,
          inputs, width,      stride_x, stride_weight, dtype_of(dtype)};
}

// x, bias, residual, norm_weight, norm_bias, out, tokens, hidden, stride_x, stride_residual, eps, dtype
using AddTuple = std::tuple<Address, Address, Address, Address, Address, Address, int, int, int64_t, int64_t,
                            float, std::string>;

AddLayerNorm add_of(const AddTuple& tuple) {
  const auto& [x, bias, residual, weight, norm_bias, result, tokens, hidden, stride_x, stride_residual, eps,
               dtype] = tuple;
  return {in(x),  in(bias), in(residual), in(weight),      in(norm_bias), out(result),
          tokens, hidden,   stride_x,     stride_residual, eps,           dtype_of(dtype)};
}

void run_embed_layer_norm(const std::vector<Address>& ids, const std::vector<Address>& tables,
                          Address norm_weight, Address norm_bias, Address result,
                          const std::vector<int>& rows, const std::vector<int64_t>& strides,
                          const std::vector<bool>& wide_ids, int tokens, int hidden, float eps,
                          const std::string& dtype) {
  EmbedLayerNorm arguments{};
  for (int i = 0; i < 3; ++i) {
    arguments.ids[i] = in(ids.at(i));
    arguments.tables[i] = in(tables.at(i));
    arguments.rows[i] = rows.at(i);
    arguments.strides[i] = strides.at(i);
    arguments.wide_ids[i] = wide_ids.at(i);
  }
  arguments.norm_weight = in(norm_weight);
  arguments.norm_bias = in(norm_bias);
  arguments.out = out(result);
  arguments.tokens = tokens;
  arguments.hidden = hidden;
  arguments.eps = eps;
  arguments.dtype = dtype_of(dtype);
  accepted(embed_layer_norm(arguments, nullptr));
}

}  // namespace

PYBIND11_MODULE(kernels_on_host, module) {
  py::register_local_exception<emulator::Error>(module, "EmulatorError", PyExc_RuntimeError);
  module.def("configure", configure);
  module.def("statistics", statistics);
  module.def("planted", run_planted);
  module.def("attention", run_attention);
  module.def("linear_gelu",
             [](const LinearTuple& linear) { accepted(linear_gelu(linear_of(linear), nullptr)); });
  module.def("add_layer_norm", [](const AddTuple& add) { accepted(add_layer_norm(add_of(add), nullptr)); });
  module.def("linear_add_layer_norm", [](const LinearTuple& linear, const AddTuple& add) {
    accepted(linear_add_layer_norm(linear_of(linear), add_of(add), nullptr));
  });
  module.def("embed_layer_norm", run_embed_layer_norm);
}

}  // namespace pruned_ops::cuda

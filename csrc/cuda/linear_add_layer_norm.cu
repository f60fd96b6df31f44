// Op linear_add_layer_norm: LayerNorm(x weight^T + bias + residual), as two kernels: linear.cuh's product,
// rounded to the tensors' dtype, and add_layer_norm. A row is wider than a tile of the product, so that one
// kernel would have to wait for others.
#include "linear.cuh"

namespace pruned_ops::cuda {
namespace {

struct Product {
  static constexpr bool kBias = false;
  static PRUNED_OPS_DEVICE float of(float x) { return x; }
};

}  // namespace

const char* linear_add_layer_norm(const Linear& linear, const AddLayerNorm& add, void* stream) {
  const char* error = visit_half(linear.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return start_linear<T, Product>(linear, stream);
  });
  return error != nullptr ? error : add_layer_norm(add, stream);
}

}  // namespace pruned_ops::cuda

// Op add_layer_norm: LayerNorm(x + bias + residual).
//
// A warp owns a row of up to 1024 numbers, a block a longer one; it reads x and residual once into registers,
// and writes the row normalised. The sum is taken in float and rounded once, at the end.
#include "kernels.h"
#include "row_norm.cuh"

namespace pruned_ops::cuda {
namespace {

template <class T, int THREADS, bool ALIGNED>
__global__ void __launch_bounds__(row_block_threads<THREADS>(), row_blocks<THREADS>())
    add_layer_norm_kernel(Global<const T> x, Global<const T> bias, Global<const T> residual,
                          Global<const T> norm_weight, Global<const T> norm_bias, Global<T> out, int tokens,
                          int hidden, int64_t stride_x, int64_t stride_residual, float eps) {
  const int token = row_index<THREADS>();
  if (token >= tokens) return;
  Row<T, THREADS, ALIGNED> row;
  row.load(x + token * stride_x, hidden);
  row.add(residual + token * stride_residual, hidden);
  if (bias != nullptr) row.add(bias, hidden);
  row.normalise(norm_weight, norm_bias, hidden, eps);
  row.store(out + static_cast<int64_t>(token) * hidden, hidden);
}

template <class T, int THREADS, bool ALIGNED>
const char* start(const AddLayerNorm& a, void* stream) {
  return launch(add_layer_norm_kernel<T, THREADS, ALIGNED>, row_grid<THREADS>(a.tokens),
                row_block_threads<THREADS>(), row_shared_bytes<THREADS>(), stream, static_cast<const T*>(a.x),
                static_cast<const T*>(a.bias), static_cast<const T*>(a.residual),
                static_cast<const T*>(a.norm_weight), static_cast<const T*>(a.norm_bias),
                static_cast<T*>(a.out), a.tokens, a.hidden, a.stride_x, a.stride_residual, a.eps);
}

template <class T>
const char* start(const AddLayerNorm& a, void* stream) {
  const int bytes = sizeof(T);
  const bool aligned = is_aligned(a.x, a.stride_x, bytes) && is_aligned(a.bias, 0, bytes) &&
                       is_aligned(a.residual, a.stride_residual, bytes) &&
                       is_aligned(a.norm_weight, 0, bytes) && is_aligned(a.norm_bias, 0, bytes) &&
                       is_aligned(a.out, a.hidden, bytes);
  if (!aligned) return start<T, kBlockRow, false>(a, stream);
  return a.hidden <= kMaxWarpRow ? start<T, kWarpRow, true>(a, stream) : start<T, kBlockRow, true>(a, stream);
}

}  // namespace

const char* add_layer_norm(const AddLayerNorm& arguments, void* stream) {
  return visit(arguments.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return start<T>(arguments, stream);
  });
}

}  // namespace pruned_ops::cuda

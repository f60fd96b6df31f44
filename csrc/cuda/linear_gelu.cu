// Op linear_gelu: GELU(x weight^T + bias) of the sums in float; linear.cuh has the plan.
#include "gelu.cuh"
#include "linear.cuh"

namespace pruned_ops::cuda {
namespace {

struct Gelu {
  static constexpr bool kBias = true;
  static PRUNED_OPS_DEVICE float of(float x) { return gelu(x); }
};

}  // namespace

const char* linear_gelu(const Linear& arguments, void* stream) {
  return visit_half(arguments.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return start_linear<T, Gelu>(arguments, stream);
  });
}

}  // namespace pruned_ops::cuda

#pragma once

#include <ATen/core/Tensor.h>

namespace pruned_ops {

// The kernels read rows in place wherever they lie (in a view of some columns, say), as long as the elements
// of a row are next to each other. A matrix in any other layout is copied.
inline at::Tensor with_contiguous_rows(const at::Tensor& matrix) {
  return matrix.stride(1) == 1 || matrix.size(1) <= 1 ? matrix : matrix.contiguous();
}

}  // namespace pruned_ops

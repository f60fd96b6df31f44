#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace pruned_ops::cpu {

// A stack of post-LN encoder parts, attention and FFN, in one call: reference.encoder says what it means.
// x (tokens, hidden); six tensors a part in weights: panels and bias of the first linear, of the second, and
// the norm's weight and bias. widths: a part's number of heads, or -1 - FFN width.
at::Tensor encoder(const at::Tensor& x, const at::Tensor& cu_seqlens, int64_t max_seqlen,
                   at::TensorList weights, at::IntArrayRef widths, int64_t head_dim, double eps);

}  // namespace pruned_ops::cpu

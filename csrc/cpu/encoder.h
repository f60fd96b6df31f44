#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace pruned_ops::cpu {

// Runs a stack of encoder parts, attentions and FFNs; reference_encoder.encoder says what it computes.
// x (tokens, hidden). widths: one integer per part, as panels.h defines it. weights: six tensors per part:
// panels and bias of its first linear, panels and bias of its second, weight and bias of its LayerNorm.
at::Tensor encoder(const at::Tensor& x, const at::Tensor& cu_seqlens, int64_t max_seqlen,
                   at::TensorList weights, at::IntArrayRef widths, int64_t head_dim, double eps,
                   bool norm_first, bool gated, const std::optional<at::Tensor>& positions,
                   const std::optional<at::Tensor>& rotary, const std::optional<at::IntArrayRef>& windows,
                   const std::optional<at::Tensor>& position_bias,
                   const std::optional<at::Tensor>& final_norm,
                   const std::optional<at::Tensor>& position_keys,
                   const std::optional<at::Tensor>& position_queries,
                   const std::optional<at::Tensor>& distance_rows);

}  // namespace pruned_ops::cpu

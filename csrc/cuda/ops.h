// The CUDA kernels on torch's tensors, all on one GPU; on its current stream, without waiting for it. Shapes
// are checked, values are not: the kernels clamp them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace pruned_ops::cuda {

// softmax(q k^T / sqrt(head_dim)) v within each sequence of a packed batch.
// qkv float16 or bfloat16 (tokens, 3 * num_heads * head_dim) laid out q|k|v, head_dim 32, 64 or 128;
// cu_seqlens int32 (batch + 1,). Returns (tokens, num_heads * head_dim).
at::Tensor attention(const at::Tensor& qkv, const at::Tensor& cu_seqlens, int64_t max_seqlen,
                     int64_t head_dim);

// GELU(x weight^T + bias). float16 or bfloat16; x (tokens, in), weight (width, in), bias (width,).
at::Tensor linear_gelu(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias);

// LayerNorm(x + bias + residual). x, residual (tokens, hidden); bias, norm_weight, norm_bias (hidden,); of
// float32, float16 or bfloat16.
at::Tensor add_layer_norm(const at::Tensor& x, const std::optional<at::Tensor>& bias,
                          const at::Tensor& residual, const at::Tensor& norm_weight,
                          const at::Tensor& norm_bias, double eps);

// LayerNorm(x weight^T + bias + residual). float16 or bfloat16; x (tokens, in), weight (hidden, in).
at::Tensor linear_add_layer_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                                 const at::Tensor& residual, const at::Tensor& norm_weight,
                                 const at::Tensor& norm_bias, double eps);

// LayerNorm(word[input_ids] + token_type[token_type_ids] + position[position_ids]).
// ids int32 or int64 (tokens,); tables (rows, hidden) of float32, float16 or bfloat16.
at::Tensor embed_layer_norm(const at::Tensor& input_ids, const at::Tensor& position_ids,
                            const at::Tensor& token_type_ids, const at::Tensor& word,
                            const at::Tensor& position, const at::Tensor& token_type,
                            const at::Tensor& norm_weight, const at::Tensor& norm_bias, double eps);

}  // namespace pruned_ops::cuda

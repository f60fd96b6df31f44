#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "cpu/kernels.h"

namespace pruned_ops::cpu {

// The checked parameters of a LayerNorm over rows of `hidden` floats.
struct Norm {
  Norm(const char* op, const at::Tensor& norm_weight, const at::Tensor& norm_bias, int64_t hidden,
       double eps);

  at::Tensor weight, bias;  // what args points into
  LayerNormArgs args;
};

// LayerNorm(x + bias + residual). x, residual float32 (tokens, hidden); bias, norm_weight, norm_bias
// (hidden,).
at::Tensor add_layer_norm(const at::Tensor& x, const std::optional<at::Tensor>& bias,
                          const at::Tensor& residual, const at::Tensor& norm_weight,
                          const at::Tensor& norm_bias, double eps);

// LayerNorm(word[input_ids] + token_type[token_type_ids] + position[position_ids]).
// ids int32 or int64 (tokens,); tables float32 (rows, hidden). Returns (tokens, hidden).
at::Tensor embed_layer_norm(const at::Tensor& input_ids, const at::Tensor& position_ids,
                            const at::Tensor& token_type_ids, const at::Tensor& word,
                            const at::Tensor& position, const at::Tensor& token_type,
                            const at::Tensor& norm_weight, const at::Tensor& norm_bias, double eps);

}  // namespace pruned_ops::cpu

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "cpu/kernels.h"

namespace pruned_ops::cpu {

// softmax(q k^T / sqrt(head_dim)) v within each sequence of a packed batch.
// qkv float32 (tokens, 3 * num_heads * head_dim) laid out q|k|v; cu_seqlens int32 (batch + 1,).
// Returns (tokens, num_heads * head_dim). Zero heads, tokens or sequence lengths are fine.
// reference.attention says what positions, rotary, window and the rest do.
at::Tensor attention(const at::Tensor& qkv, const at::Tensor& cu_seqlens, int64_t max_seqlen,
                     int64_t head_dim, const std::optional<at::Tensor>& positions,
                     const std::optional<at::Tensor>& rotary, std::optional<int64_t> window,
                     const std::optional<at::Tensor>& position_bias,
                     const std::optional<at::Tensor>& position_key,
                     const std::optional<at::Tensor>& position_query,
                     const std::optional<at::Tensor>& distance_rows);

// The same on checked pointers; it runs in parallel. Query and key are rotated before.
void run_attention(const AttentionKernel& kernel, const AttentionArgs& args);

// The position of each token, int32 (tokens,), contiguous: as they were given, or 0, 1, 2 and so on in each
// sequence.
at::Tensor positions_of(const std::optional<at::Tensor>& given, const int32_t* bounds, int64_t batch,
                        int64_t tokens);

// cosines | sines float32 (tokens, head_dim) of positions times inverse frequencies (head_dim / 2,).
at::Tensor cos_sin(const at::Tensor& positions, const at::Tensor& rotary);

// The bias as kernels add it, to products that are not scaled yet: terms of head_dim each.
at::Tensor unscaled_bias(const at::Tensor& position_bias, int64_t head_dim, int64_t terms);

// What queries and keys are multiplied by for their distance, checked: position_key and position_query as
// panels (heads, panels, head_dim, 32) of the rows of each head. Keeps what had to be copied.
struct Relative {
  at::Tensor keys, queries, rows;
  RelativeArgs args;

  Relative() = default;
  Relative(const char* op, const std::optional<at::Tensor>& keys, const std::optional<at::Tensor>& queries,
           const std::optional<at::Tensor>& distance_rows, int64_t heads, int64_t head_dim);

  // The same from a head on.
  RelativeArgs from(int64_t head, int64_t head_dim) const;
};

}  // namespace pruned_ops::cpu

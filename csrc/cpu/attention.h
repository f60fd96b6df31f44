#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "cpu/kernels.h"

namespace pruned_ops::cpu {

// softmax(q k^T / sqrt(head_dim)) v within each sequence of a packed batch.
// qkv float32 (tokens, 3 * num_heads * head_dim) laid out q|k|v; cu_seqlens int32 (batch + 1,).
// Returns (tokens, num_heads * head_dim). Zero heads, tokens or sequence lengths are fine.
at::Tensor attention(const at::Tensor& qkv, const at::Tensor& cu_seqlens, int64_t max_seqlen,
                     int64_t head_dim);

// The same on checked pointers; it runs in parallel.
void run_attention(const AttentionKernel& kernel, const AttentionArgs& args);

}  // namespace pruned_ops::cpu

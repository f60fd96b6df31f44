// The host functions of the CUDA kernels, one .cu file each. They take raw pointers to device memory, sizes
// and a stream, and no torch type. They check no shapes (csrc/cuda/ops.cpp does), and return nullptr or the
// reason why the launch was refused.
//
// Strides count numbers, not bytes. The last dimension of every matrix is contiguous; weights are (out, in).
// What an op means stands in pruned_ops/ops/reference.py.
#pragma once

#include <cstdint>

namespace pruned_ops::cuda {

enum class Dtype { float32, float16, bfloat16 };

// The longest rows that the LayerNorm kernels take.
constexpr int kMaxHidden = 8192;

// float16 or bfloat16; head_dim 32, 64 or 128; qkv's base and its rows begin at multiples of 16 bytes.
struct Attention {
  const void* qkv;            // (tokens, 3 * num_heads * head_dim), rows of stride_qkv
  const int32_t* cu_seqlens;  // (batch + 1); values are clamped to [0, tokens]
  void* out;                  // (tokens, num_heads * head_dim), contiguous, aligned as qkv
  int tokens, batch, num_heads, head_dim, max_seqlen;
  int64_t stride_qkv;
  Dtype dtype;
};

// float16 or bfloat16. Any alignment; bases and rows at multiples of 16 bytes are faster.
struct Linear {
  const void* x;       // (tokens, in), rows of stride_x
  const void* weight;  // (width, in), rows of stride_weight
  const void* bias;    // (width)
  void* out;           // (tokens, width), contiguous
  int tokens, in, width;
  int64_t stride_x, stride_weight;
  Dtype dtype;
};

// Any dtype; hidden at most kMaxHidden.
struct AddLayerNorm {
  const void* x;         // (tokens, hidden), rows of stride_x
  const void* bias;      // (hidden) or nullptr
  const void* residual;  // (tokens, hidden), rows of stride_residual
  const void* norm_weight;
  const void* norm_bias;  // (hidden)
  void* out;              // (tokens, hidden), contiguous
  int tokens, hidden;
  int64_t stride_x, stride_residual;
  float eps;
  Dtype dtype;
};

// Ids int32 or int64 and contiguous; those outside their table are clamped.
struct EmbedLayerNorm {
  const void* ids[3];     // word, position, token type: (tokens)
  const void* tables[3];  // the same order: (rows, hidden), rows of strides[i]
  const void* norm_weight;
  const void* norm_bias;
  void* out;  // (tokens, hidden), contiguous
  int rows[3];
  int64_t strides[3];
  bool wide_ids[3];  // int64
  int tokens, hidden;
  float eps;
  Dtype dtype;
};

// Whether an address, and rows `stride` numbers apart, lie at multiples of 16 bytes.
inline bool is_aligned(const void* address, int64_t stride, int number_bytes) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0 && stride * number_bytes % 16 == 0;
}

const char* attention(const Attention& arguments, void* stream);
const char* linear_gelu(const Linear& arguments, void* stream);
const char* add_layer_norm(const AddLayerNorm& arguments, void* stream);
// add.x is linear's out: a buffer for the product. linear.bias is not read, add.bias is.
const char* linear_add_layer_norm(const Linear& linear, const AddLayerNorm& add, void* stream);
const char* embed_layer_norm(const EmbedLayerNorm& arguments, void* stream);

}  // namespace pruned_ops::cuda

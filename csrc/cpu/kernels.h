// What the portable code knows of the kernels: plain pointers, sizes, and one table per capability.
// No torch header here: the files compiled with AVX flags must not share inline functions with the rest.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "panels.h"

namespace pruned_ops {

// Query rows of one attention task. Every capability's block of rows (16, 12, 8, 6 or 2) divides it; larger
// would leave threads idle on small batches, smaller would read the laid-out keys more often than needed.
constexpr int64_t kQueryBlock = 48;

// What queries and keys are multiplied by for their distance, as reference.attention describes it.
struct RelativeArgs {
  // (num_heads, rows, head_dim), each head as panels.h draws a weight; null for nothing.
  const float* keys = nullptr;
  const float* queries = nullptr;
  const int32_t* row_of_distance = nullptr;  // (2 * reach + 1,), never falling
  int64_t rows = 0;
  int64_t reach = 0;
  bool is_gradual = false;  // the row rises by at most 1 from a distance to the next

  bool is_given() const { return keys != nullptr || queries != nullptr; }
  // The number of products that make a score.
  int64_t terms() const { return 1 + (keys != nullptr) + (queries != nullptr); }
};

// One call of attention, checked. Rows of qkv are row_stride numbers apart; context is contiguous.
struct AttentionArgs {
  const void* qkv;  // float, or bfloat16 for a kernel that takes that
  int64_t row_stride;
  const int32_t* cu_seqlens;  // (batch + 1,)
  int64_t batch;
  int64_t num_heads;
  int64_t head_dim;
  int64_t longest;  // tokens of the longest sequence
  float* context;   // (tokens, num_heads * head_dim)
  // (tokens,), rising within each sequence; null for 0, 1, 2 and so on.
  const int32_t* positions = nullptr;
  int64_t window = -1;  // the largest distance of a key from its query; negative for any
  // Added to q k^T: (num_heads, 2 * reach + 1), by the key's position less the query's; null for nothing.
  const float* bias = nullptr;
  int64_t reach = 0;
  RelativeArgs relative = {};
};

// What a query row of a sequence of this length costs, in keys.
static inline int64_t row_cost(const AttentionArgs& args, int64_t length) {
  const bool all = args.window < 0 || args.window >= length;
  return all || 2 * args.window + kQueryBlock >= length ? length : 2 * args.window + kQueryBlock;
}

// The parameters of a LayerNorm over rows of hidden floats.
struct LayerNormArgs {
  const float* weight;
  const float* bias;
  int64_t hidden;
  float eps;
};

// Rows that a thread takes through several products while they stay in its L2. Enough to read each weight
// rarely; the FFN activations of so many rows, up to 3072 wide, take 1.2 MB.
constexpr int64_t kChunkRows = 96;
// The same where AMX multiplies: it waits for weights, which so many rows read less often. Against 96, int8
// and bfloat16 take up to a fifth less time on MiniLM and BERT-base from 128 tokens on; 256 are no better.
constexpr int64_t kAmxChunkRows = 128;

// What follows a product, while its tile is in L1.
// kBiasGeglu makes 16 numbers of the 32 channels of a panel: GELU of the first 16 times the others.
enum class Finish { kNothing, kBias, kBiasGelu, kBiasGeglu };

// x weight^T + bias in fp32.
struct LinearArgs {
  const float* panels;  // the weight, as panels.h draws it
  const float* bias;    // (out,)
  int64_t in;
  int64_t out;
};

struct AttentionKernel {
  // Floats of scratch that one thread needs, to be aligned to 64 bytes.
  int64_t (*scratch)(const AttentionArgs& args);
  // Runs the tasks whose start lies in [begin, end) of the cost axis that csrc/cpu/attention.cpp splits.
  void (*run)(const AttentionArgs& args, int64_t begin, int64_t end, float* scratch);
};

struct Kernels {
  const char* capability;
  AttentionKernel attention;
  // out = finish(x weight^T) for at most kChunkRows rows.
  void (*linear)(const LinearArgs& args, const float* x, int64_t x_stride, int64_t rows, Finish finish,
                 float* out, int64_t out_stride);
  // out = LayerNorm(first + second + third); third may be null, or both. out may be one of them.
  void (*layer_norm_row)(const LayerNormArgs& args, const float* first, const float* second,
                         const float* third, float* out);
  // out = first + second + third, numbers each; out may be one of them.
  void (*add_row)(int64_t numbers, const float* first, const float* second, const float* third, float* out);
  // Rotates the heads of a row in place. cos_sin: head_dim / 2 cosines, then as many sines.
  void (*rotate_row)(float* row, int64_t heads, int64_t head_dim, const float* cos_sin);
};

// Values of a quantised row that a kernel writes at once, at most; the row has room for as many as it fills.
constexpr int64_t kStoredValues = 32;

// What a row whose largest magnitude is `top` is multiplied by to become whole numbers of at most 127; its
// scale is top / 127. 0 where `top` is no finite number. The least numbers have no such factor, and get the
// largest that there is.
static inline float quantizing_factor(float top) {
  return top > 0.0f ? std::min(127.0f / top, std::numeric_limits<float>::max()) : 0.0f;
}

// Rows for a narrow linear, `stride` bytes apart (a multiple of 64 that a row fits into). Rounded to bf16
// they are filled up with zeros to whole pairs. Quantised they have a scale each; how the values lie is
// between the functions of one Int8Kernels, and what fills a row up to whole groups adds nothing.
struct NarrowRows {
  uint8_t* bytes;
  int64_t stride;
  float* scales;

  NarrowRows from(int64_t row) const { return {bytes + row * stride, stride, scales + row}; }
};

// x weight^T + bias in int8: the weight has a scale per output channel; x has a scale per row.
struct Int8LinearArgs {
  const int8_t* panels;  // the weight, as panels.h draws it
  const float* bias;     // (out,)
  const float* scales;   // (out,)
  int64_t in;
  int64_t out;
};

struct Int8Kernels {
  const char* capability;
  int64_t chunk_rows;       // the most rows of a call
  int64_t quantized_bytes;  // of a quantised value
  int64_t tail_bytes;       // of a quantised row besides
  // Quantises rows of x to whole numbers of at most 127, and a scale per row.
  void (*quantize)(const float* x, int64_t x_stride, int64_t rows, int64_t in, const NarrowRows& out);
  // As Kernels::linear, on at most chunk_rows quantised rows. What lies where further rows would, up to a
  // whole number of 16, may be read; so in the next two.
  void (*linear)(const Int8LinearArgs& args, const NarrowRows& x, int64_t rows, Finish finish, float* out,
                 int64_t out_stride);
  // finish(x weight^T), which ends in GELU or GEGLU, of at most chunk_rows rows, quantised. width: the
  // numbers of a row of it, without those by which GEGLU fills a panel up. inner: room for it in float.
  void (*linear_gelu)(const Int8LinearArgs& args, const NarrowRows& x, int64_t rows, Finish finish,
                      int64_t width, float* inner, int64_t inner_stride, const NarrowRows& out);
  // x weight^T + bias as bfloat16, for Bf16Kernels' attention: `out` of args is a multiple of 16. Null where
  // the processor has no such attention.
  void (*linear_bf16)(const Int8LinearArgs& args, const NarrowRows& x, int64_t rows, uint16_t* out,
                      int64_t out_stride);
};

// The fastest that this processor has, or less where ATEN_CPU_CAPABILITY asks for less. `avx512` leaves out
// AMX, and `default` all of ARM's products of bytes.
const Int8Kernels& int8_kernels();

// x weight^T + bias, both rounded to bf16, with fp32 sums.
struct Bf16LinearArgs {
  const uint16_t* panels;  // the weight's bits, as panels.h draws it
  const float* bias;       // (out,)
  int64_t in;
  int64_t out;
};

struct Bf16Kernels {
  const char* capability;
  int64_t chunk_rows;  // the most rows of a call
  void (*round)(const float* x, int64_t x_stride, int64_t rows, int64_t in, uint16_t* rounded,
                int64_t rounded_stride);
  // As Kernels::linear, on rounded rows.
  void (*linear)(const Bf16LinearArgs& args, const NarrowRows& x, int64_t rows, Finish finish, float* out,
                 int64_t out_stride);
  // The same, rounded: rows of out_stride numbers.
  void (*linear_bf16)(const Bf16LinearArgs& args, const NarrowRows& x, int64_t rows, Finish finish,
                      uint16_t* out, int64_t out_stride);
  // On q|k|v in bf16; head_dim is a multiple of 16.
  AttentionKernel attention;
  // As Kernels::rotate_row, in bf16; head_dim is a multiple of 16.
  void (*rotate_row)(uint16_t* row, int64_t heads, int64_t head_dim, const float* cos_sin);
};

// Null where this processor cannot, or ATEN_CPU_CAPABILITY asks for less.
const Bf16Kernels* bf16_kernels();

// The table for the capability that ATen runs its own kernels with (it obeys ATEN_CPU_CAPABILITY).
const Kernels& kernels();

}  // namespace pruned_ops

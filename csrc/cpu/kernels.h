// What the portable code knows of the kernels: plain pointers, sizes, and one table per capability.
// No torch header here: the files compiled with AVX flags must not share inline functions with the rest.
#pragma once

#include <cstdint>

namespace pruned_ops {

// Query rows of one attention task. Every capability's register block (12, 8, 6 or 2 rows) divides it; larger
// would leave threads idle on small batches, smaller would read the packed keys more often than needed.
constexpr int64_t kQueryBlock = 48;

// One call of attention, checked. Rows of qkv are row_stride floats apart; context is contiguous.
struct AttentionArgs {
  const float* qkv;
  int64_t row_stride;
  const int32_t* cu_seqlens;  // (batch + 1,)
  int64_t batch;
  int64_t num_heads;
  int64_t head_dim;
  int64_t longest;  // tokens of the longest sequence
  float* context;   // (tokens, num_heads * head_dim)
};

// The parameters of a LayerNorm over rows of hidden floats.
struct LayerNormArgs {
  const float* weight;
  const float* bias;
  int64_t hidden;
  float eps;
};

// Columns of a weight that lie together: weights are packed as panels (ceil(out / 32), in, 32), panel by
// panel and input by input, the last one filled up with zeros. One layout for every capability.
constexpr int64_t kWeightPanel = 32;
// Bytes of a panel's step: an input of 32 channels in fp32, four in int8.
constexpr int64_t kStepBytes = 128;

// Rows that a thread takes through several products while they stay in its L2. Enough to read each weight
// rarely; the FFN activations of so many rows, up to 3072 wide, take 1.2 MB.
constexpr int64_t kChunkRows = 96;

// What follows a product, while its tile is in L1.
enum class Finish { kNothing, kBias, kBiasGelu };

// x weight^T + bias, the weight packed.
struct LinearArgs {
  const float* panels;
  const float* bias;  // (out,)
  int64_t in;
  int64_t out;
};

struct Kernels {
  const char* capability;
  // Floats of scratch that one thread needs, to be aligned to 64 bytes.
  int64_t (*attention_scratch)(const AttentionArgs& args);
  // Runs the tasks whose start lies in [begin, end) of the cost axis that csrc/cpu/attention.cpp splits.
  void (*attention)(const AttentionArgs& args, int64_t begin, int64_t end, float* scratch);
  // out = finish(x weight^T) for some rows, at best kChunkRows or fewer.
  void (*linear)(const LinearArgs& args, const float* x, int64_t x_stride, int64_t rows, Finish finish,
                 float* out, int64_t out_stride);
  // out = LayerNorm(first + second + third); third may be null. out may be one of them.
  void (*layer_norm_row)(const LayerNormArgs& args, const float* first, const float* second,
                         const float* third, float* out);
};

// x weight^T + bias in int8: the weight has a scale an output channel, x a scale a row and 128 added, which
// unsigned bytes need and the sums start below 0 by. panels: (ceil(out / 32), 1 + ceil(in / 4), 128) bytes.
// A panel's first line pair holds the 32 int32 that its sums start with, -128 times the channel's weights;
// each after it 4 inputs of 32 channels, a channel's together.
struct Int8LinearArgs {
  const int8_t* panels;
  const float* bias;    // (out,)
  const float* scales;  // (out,)
  int64_t in;
  int64_t out;
};
constexpr int64_t kInt8Group = 4;  // inputs that one instruction multiplies and adds

struct Int8Kernels {
  // Rows of x -> bytes with 128 added and a scale each: x is (byte - 128) * scale, the largest being 127.
  // What fills a row up to whole groups is 128.
  void (*quantize)(const float* x, int64_t x_stride, int64_t rows, int64_t in, uint8_t* bytes,
                   int64_t bytes_stride, float* scales);
  // As Kernels::linear, of quantised rows.
  void (*linear)(const Int8LinearArgs& args, const uint8_t* x, int64_t x_stride, const float* x_scales,
                 int64_t rows, Finish finish, float* out, int64_t out_stride);
};

// Null where the processor lacks AVX-512 VNNI, or another capability was asked for.
const Int8Kernels* int8_kernels();

// The table for the capability that ATen runs its own kernels with (it obeys ATEN_CPU_CAPABILITY).
const Kernels& kernels();

}  // namespace pruned_ops

// How the CPU's encoder takes its parts and their weights: the code of a part, and the layout of a weight.
// The Python side, which makes both, is pruned_ops/ops/panels.py.
//
// A weight (out, in) lies as panels of 32 output channels, so that a kernel reads it from front to back. The
// layout is the same for every capability; zeros fill the last panel up.
//
//   fp32: panel = [ input 0: 32 floats ][ input 1 ] ... [ input in - 1 ]
//   bf16: panel = [ inputs 0 and 1: 32 channels x 2 bfloat16 ][ inputs 2 and 3 ] ...
//   int8: panel = [ start: 32 int32 ][ inputs 0 to 3: 32 channels x 4 int8 ][ inputs 4 to 7 ] ...
//
// int8 values are -127 to 127, so that each has its opposite. Each bracket is a step of 128 bytes.
// `start` holds the values at which the channels' sums start where 128 is added to the activations: -128
// times the sum of the channel's weights. VNNI needs that, because its instruction multiplies unsigned bytes
// by signed ones; other kernels pass `start` over. A tile of AMX is 16 channels of 16 steps, and a register
// of NEON four channels of one.
#pragma once

#include <cstdint>

namespace pruned_ops {

constexpr int64_t kWeightPanel = 32;  // output channels of a panel
constexpr int64_t kGatedUnits = 16;   // of a panel whose channels are 16 gates and the 16 that they multiply
constexpr int64_t kStepBytes = 128;   // 32 channels of one input in fp32, of two in bf16, of four in int8
constexpr int64_t kBf16Group = 2;     // inputs that one AVX512_BF16 instruction multiplies and adds
constexpr int64_t kInt8Group = 4;     // inputs that one VNNI instruction multiplies and adds
// Inputs whose products fit into a sum of 32 bits, whatever they are.
constexpr int64_t kMostInt8Inputs = 2147483647 / (127 * 127);

// One integer says what a part is: the number of heads of an attention, or -1 - the width of an FFN.
// `static`, because files compiled for other processors must not share inline functions with the rest.
static constexpr bool is_attention(int64_t part) {
  return part >= 0;
}

// The number of channels between the two linears of a part.
static constexpr int64_t inner_width(int64_t part, int64_t head_dim) {
  return is_attention(part) ? part * head_dim : -1 - part;
}

// The rows of a gated FFN's first weight: whole panels.
static constexpr int64_t gated_out(int64_t width) {
  return (width + kGatedUnits - 1) / kGatedUnits * kWeightPanel;
}

}  // namespace pruned_ops

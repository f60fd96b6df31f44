// The parts of an encoder, attentions and FFNs, with their tensors checked and the pointers that kernels
// take.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/attention.h"
#include "cpu/kernels.h"
#include "cpu/layer_norm.h"
#include "panels.h"

namespace pruned_ops::cpu::encoder_parts {

constexpr const char* kOp = "encoder";
constexpr int64_t kTensors = 6;  // of one part
constexpr int64_t kFloatBytes = sizeof(float);

// The floats in whose place a quantised row of so many values fits.
inline int64_t floats_of(int64_t values) {
  const int64_t filled_up = (values + kStoredValues - 1) / kStoredValues * kStoredValues;
  const int64_t bytes = filled_up * int8_kernels().quantized_bytes + int8_kernels().tail_bytes;
  return (bytes + kFloatBytes - 1) / kFloatBytes;
}

struct Linear {
  bool is_int8;
  LinearArgs fp32;  // its panels are null in int8 and bf16
  Int8LinearArgs int8;
  Bf16LinearArgs bf16;  // its panels are null but in bf16

  bool is_bf16() const { return bf16.panels != nullptr; }
  bool is_narrow() const { return is_int8 || is_bf16(); }
};

struct Part {
  bool is_attention;
  int64_t width;  // of what lies between its linears: num_heads * head_dim, or the FFN width
  Linear first, second;
  LayerNormArgs norm;
  // Of an attention:
  int64_t window;     // the largest distance of a key from its query; negative for any
  const float* bias;  // (num_heads, 2 * reach + 1), as AttentionArgs has it; null for none
  int64_t reach;
  RelativeArgs relative;
  const float* cos_sin;  // (tokens, head_dim), by which query and key are rotated; null for none

  bool has_norm() const { return norm.weight != nullptr; }
};

// What is the same for all parts.
struct Stack {
  int64_t hidden, head_dim;
  double eps;
  bool norm_first, gated;
};

// What attentions may have beside q|k|v, as reference_encoder.encoder describes it.
struct ByPosition {
  at::Tensor positions;  // int32 (tokens,)
  const std::optional<at::Tensor>& rotary;
  const std::optional<at::IntArrayRef>& windows;
  const std::optional<at::Tensor>& bias;
  // Of all attentions, one after the other; the latter for all of them.
  const std::optional<at::Tensor>&keys, &queries, &distance_rows;
};

// Where q, k and v have lost more than bf16 takes: beside int8's rounding, that of bf16 is a fifth.
inline bool attends_in_bf16(const Part& part, int64_t head_dim) {
  const bool int8 = part.first.is_int8 && int8_kernels().linear_bf16 != nullptr && bf16_kernels() != nullptr;
  const bool narrow = int8 || part.first.is_bf16();
  return part.is_attention && narrow && head_dim % 16 == 0 && !part.relative.is_given();
}

// The parts with their tensors checked. Keeps those that had to be copied.
class Parts {
 public:
  Parts(const Stack& stack, at::TensorList weights, at::IntArrayRef widths, const ByPosition& by_position)
      : stack_(stack) {
    const int64_t count = static_cast<int64_t>(widths.size());
    TORCH_CHECK(static_cast<int64_t>(weights.size()) == kTensors * count, kOp, ": weights has ",
                weights.size(), " tensors, ", kTensors, " for each of the ", count, " parts are needed");
    for (int64_t i = 0; i < count; ++i) add(weights.slice(i * kTensors, kTensors), widths[i]);
    add_positions(widths, by_position);
  }

  const Stack& stack() const { return stack_; }

  const std::vector<Part>& list() const { return list_; }

  // The most channels of a context; a third of the most of a q|k|v.
  int64_t widest_attention() const { return widest(true); }
  int64_t widest_ffn() const { return widest(false); }

  // Rows of a chunk, as all kernels that multiply it take them.
  int64_t chunk_rows() const {
    int64_t rows = kAmxChunkRows;
    for (const Part& part : list_) {
      for (const Linear* linear : {&part.first, &part.second}) {
        rows = std::min(rows, linear->is_int8     ? int8_kernels().chunk_rows
                              : linear->is_bf16() ? bf16_kernels()->chunk_rows
                                                  : kChunkRows);
      }
    }
    return rows;
  }

  // The most floats in whose place a row of inputs of a linear fits, in int8 or bf16; 0 if there is none.
  int64_t widest_narrow() const {
    int64_t floats = 0;
    for (const Part& part : list_) {
      for (const Linear* linear : {&part.first, &part.second}) {
        if (linear->is_int8) floats = std::max(floats, floats_of(linear->int8.in));
        if (linear->is_bf16()) floats = std::max(floats, (linear->bf16.in + 1) / 2);
      }
    }
    return floats;
  }

 private:
  void add(at::TensorList weights, int64_t part) {
    const int64_t hidden = stack_.hidden, inner = inner_width(part, stack_.head_dim);
    const int64_t out = is_attention(part) ? 3 * inner : stack_.gated ? gated_out(inner) : inner;
    const Linear first = linear(weights[0], "first weight", weights[1], "first bias", hidden, out);
    const Linear second = linear(weights[2], "second weight", weights[3], "second bias", inner, hidden);
    LayerNormArgs norm = {nullptr, nullptr, hidden, 0.0f};
    if (!stack_.norm_first || weights[4].numel() > 0 || weights[5].numel() > 0) {
      norms_.emplace_back(kOp, weights[4], weights[5], hidden, stack_.eps);
      norm = norms_.back().args;
    }
    list_.push_back({is_attention(part), inner, first, second, norm, -1, nullptr, 0, {}, nullptr});
  }

  void add_positions(at::IntArrayRef widths, const ByPosition& given) {
    const int64_t count = static_cast<int64_t>(widths.size()), head_dim = stack_.head_dim;
    int64_t heads = 0;
    for (const int64_t part : widths) heads += is_attention(part) ? part : 0;
    if (given.rotary) {
      check::taken(kOp, "rotary", *given.rotary, {});
      TORCH_CHECK(given.rotary->dim() == 2 && given.rotary->size(0) == count &&
                      given.rotary->size(1) == head_dim / 2 && head_dim % 2 == 0,
                  kOp, ": rotary has shape ", given.rotary->sizes(), ", [", count,
                  ", head_dim / 2] is needed, a row for each part, where head_dim is ", head_dim);
    }
    TORCH_CHECK(!given.windows || static_cast<int64_t>(given.windows->size()) == count, kOp, ": windows has ",
                given.windows ? given.windows->size() : 0, " numbers, one for each of ", count,
                " parts is needed");
    const int64_t reach = given.bias ? check::position_bias(kOp, *given.bias, heads) : 0;
    const float* bias = nullptr;
    relative_ = Relative(kOp, given.keys, given.queries, given.distance_rows, heads, head_dim);
    if (given.bias) {
      bias_ = unscaled_bias(*given.bias, head_dim, relative_.args.terms());
      bias = bias_.const_data_ptr<float>();
    }
    int64_t head = 0;  // the part's first among all
    for (int64_t i = 0; i < count; ++i) {
      Part& part = list_[i];
      if (!part.is_attention) continue;
      part.relative = relative_.from(head, head_dim);
      head += widths[i];
      if (given.windows) {
        part.window = std::min<int64_t>((*given.windows)[i], std::numeric_limits<int32_t>::max());
      }
      if (given.rotary) part.cos_sin = angles(given.rotary->select(0, i).contiguous(), given.positions);
      part.bias = bias;
      part.reach = reach;
      if (bias != nullptr) bias += widths[i] * bias_.size(1);
    }
  }

  // The cosines and sines of all tokens for these inverse frequencies; null if they are 0. Parts that have
  // the same share them.
  const float* angles(const at::Tensor& frequencies, const at::Tensor& positions) {
    const float* const data = frequencies.const_data_ptr<float>();
    const int64_t count = frequencies.numel();
    if (std::all_of(data, data + count, [](float frequency) { return frequency == 0.0f; })) return nullptr;
    for (const auto& [known, made] : angles_) {
      if (std::equal(data, data + count, known.const_data_ptr<float>())) return made.const_data_ptr<float>();
    }
    angles_.emplace_back(frequencies, cos_sin(positions, frequencies));
    return angles_.back().second.const_data_ptr<float>();
  }

  Linear linear(const at::Tensor& panels, const char* name, const at::Tensor& bias, const char* bias_name,
                int64_t in, int64_t out) {
    biases_.push_back(bias.contiguous());
    if (panels.scalar_type() == at::kChar) {
      check::int8_panels(kOp, name, panels, in, out);
      check::matrix(kOp, bias_name, bias);
      TORCH_CHECK(bias.size(0) == 2 && bias.size(1) == out, kOp, ": ", bias_name, " has shape ", bias.sizes(),
                  ", bias and scales [2, ", out, "] are needed");
      const float* rows = biases_.back().const_data_ptr<float>();
      return {
          true, {nullptr, rows, in, out}, {panels.const_data_ptr<int8_t>(), rows, rows + out, in, out}, {}};
    }
    check::vector(kOp, bias_name, bias, out);
    const float* added = biases_.back().const_data_ptr<float>();
    if (panels.scalar_type() == at::kBFloat16) {
      check::bf16_panels(kOp, name, panels, in, out);
      TORCH_CHECK(bf16_kernels() != nullptr, kOp, ": ", name,
                  " is bfloat16, which takes a processor with AVX512_BF16");
      const auto* bits = reinterpret_cast<const uint16_t*>(panels.const_data_ptr<at::BFloat16>());
      return {false, {nullptr, added, in, out}, {}, {bits, added, in, out}};
    }
    check::panels(kOp, name, panels, in, out);
    return {false, {panels.const_data_ptr<float>(), added, in, out}, {}, {}};
  }

  int64_t widest(bool of_attention) const {
    int64_t width = 0;
    for (const Part& part : list_) {
      if (part.is_attention == of_attention) width = std::max(width, part.width);
    }
    return width;
  }

  const Stack stack_;
  std::vector<Part> list_;
  std::vector<at::Tensor> biases_;
  std::vector<Norm> norms_;
  at::Tensor bias_;
  Relative relative_;
  std::vector<std::pair<at::Tensor, at::Tensor>> angles_;
};

}  // namespace pruned_ops::cpu::encoder_parts

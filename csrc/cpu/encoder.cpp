// The whole encoder in one call. Between two attentions nothing needs other tokens, so a thread takes a chunk
// of rows through everything there is between them (output projection and LayerNorm, FFN, the next q|k|v)
// while the chunk is in its L2: the FFN's activations never leave it. The residual stream is updated in
// place.
#include "cpu/encoder.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "check.h"
#include "cpu/attention.h"
#include "cpu/kernels.h"
#include "cpu/layer_norm.h"
#include "panels.h"
#include "rows.h"

namespace pruned_ops::cpu {

namespace {

constexpr const char* kOp = "encoder";
constexpr int64_t kTensors = 6;  // of one part
constexpr int64_t kFloatBytes = sizeof(float);
constexpr int64_t kBf16Bytes = sizeof(uint16_t);
// Against all tokens at once: 3% to 5% less time on MiniLM (6% to 8% in int8), 1% to 3% on BERT-base, from
// 1500 tokens on; 2048 gains half of it, 768 loses it again.
constexpr int64_t kGroupTokens = 1024;
// Where q|k|v are in bf16, for each thread: 2% less time than with 1024, on MiniLM and BERT-base; 256 is no
// better.
constexpr int64_t kNarrowGroupTokens = 512;
// The same where AMX multiplies all products: up to a seventh less time than with 512 on MiniLM, up to a tenth
// on BERT-base, and with sequences of 384 tokens none beyond the noise. Weights are read once a chunk anyway.
constexpr int64_t kAmxGroupTokens = kAmxChunkRows;
// With fewer rows per thread the weights would be read too often for what is computed with them.
constexpr int64_t kLeastRows = 8;

// Floats from one row to the next of a scratch matrix: whole vectors, and an odd number of cache lines, so
// that the rows of a block lie in different sets of the cache.
int64_t scratch_stride(int64_t columns) {
  return ((columns + 15) / 16 | 1) * 16;
}

// The floats in whose place so many quantised values of a row fit.
int64_t floats_of(int64_t values) {
  return (values * int8_kernels().quantized_bytes + kFloatBytes - 1) / kFloatBytes;
}

// Calls run(begin, end, scratch) for the rows of a batch: every thread takes an even share of them, in chunks
// of at most chunk_rows. scratch: scratch_floats floats of this thread's own, aligned to 64 bytes.
template <typename Run>
void for_each_chunk(int64_t rows, int64_t chunk_rows, int64_t scratch_floats, const Run& run) {
  if (rows == 0) return;
  const int64_t shares = std::clamp<int64_t>(rows / kLeastRows, 1, at::get_num_threads());
  const int64_t stride = (scratch_floats + 15) / 16 * 16;
  const at::DataPtr scratch =
      c10::GetCPUAllocator()->allocate(static_cast<size_t>(shares * stride) * sizeof(float));
  float* first_scratch = static_cast<float*>(scratch.get());
  at::parallel_for(0, shares, 1, [&](int64_t from, int64_t to) {
    for (int64_t share = from; share < to; ++share) {
      const int64_t begin = rows * share / shares;
      const int64_t count = rows * (share + 1) / shares - begin;
      const int64_t chunks = (count + chunk_rows - 1) / chunk_rows;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        run(begin + count * chunk / chunks, begin + count * (chunk + 1) / chunks,
            first_scratch + share * stride);
      }
    }
  });
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
};

// Where q, k and v have lost more than bf16 takes: beside int8's rounding, that of bf16 is a fifth.
bool attends_in_bf16(const Part& part, int64_t head_dim) {
  const bool int8 = part.first.is_int8 && int8_kernels().linear_bf16 != nullptr && bf16_kernels() != nullptr;
  return part.is_attention && (int8 || part.first.is_bf16()) && head_dim % 16 == 0;
}

// A thread's scratch, cut into what a chunk of rows needs.
struct Scratch {
  float* inner;       // the FFN's activations
  float* sums;        // the second linear's output, which the LayerNorm takes
  NarrowRows x;       // the chunk of x, quantised or rounded
  NarrowRows middle;  // what a second linear takes, quantised or rounded
  bool x_is_narrow;   // by the LayerNorm that wrote the chunk
};

// The parts with their tensors checked. Keeps those that had to be copied.
class Parts {
 public:
  Parts(at::TensorList weights, at::IntArrayRef widths, int64_t hidden, int64_t head_dim, double eps) {
    const int64_t count = static_cast<int64_t>(widths.size());
    TORCH_CHECK(static_cast<int64_t>(weights.size()) == kTensors * count, kOp, ": weights has ",
                weights.size(), " tensors, ", kTensors, " for each of the ", count, " parts are needed");
    for (int64_t i = 0; i < count; ++i) {
      add(weights.slice(i * kTensors, kTensors), widths[i], hidden, head_dim, eps);
    }
  }

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
  void add(at::TensorList weights, int64_t part, int64_t hidden, int64_t head_dim, double eps) {
    const int64_t inner = inner_width(part, head_dim);
    const Linear first = linear(weights[0], "first weight", weights[1], "first bias", hidden,
                                is_attention(part) ? 3 * inner : inner);
    const Linear second = linear(weights[2], "second weight", weights[3], "second bias", inner, hidden);
    norms_.emplace_back(kOp, weights[4], weights[5], hidden, eps);
    list_.push_back({is_attention(part), inner, first, second, norms_.back().args});
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

  std::vector<Part> list_;
  std::vector<at::Tensor> biases_;
  std::vector<Norm> norms_;
};

class Run {
 public:
  Run(const Parts& parts, AttentionArgs sequences, int64_t hidden, at::Tensor& x)
      : parts_(parts),
        sequences_(sequences),
        hidden_(hidden),
        tokens_(x.size(0)),
        x_(x.mutable_data_ptr<float>()),
        chunk_rows_(parts.chunk_rows()),
        inner_stride_(scratch_stride(parts.widest_ffn())),
        sums_stride_(scratch_stride(hidden)),
        bytes_stride_(kFloatBytes * scratch_stride(parts.widest_narrow())),
        qkv_(at::empty({tokens_, 3 * parts.widest_attention()}, x.options())),
        context_(at::empty({tokens_, parts.widest_attention()}, x.options())) {}

  void all() {
    std::vector<const Part*> ready;  // parts whose rows no longer wait for an attention
    for (const Part& part : parts_.list()) {
      if (part.is_attention) {
        rows(ready, part.width > 0 ? &part : nullptr);
        ready.clear();
        if (part.width > 0) attend(part);
      }
      ready.push_back(&part);
    }
    rows(ready, nullptr);
  }

 private:
  // Takes all rows through what the `ready` parts still have to do, then computes the q|k|v of `next`.
  void rows(const std::vector<const Part*>& ready, const Part* next) {
    if (ready.empty() && next == nullptr) return;
    const int64_t inner_floats = chunk_rows_ * inner_stride_;
    const int64_t sums_floats = chunk_rows_ * sums_stride_;
    const int64_t bytes_floats = chunk_rows_ * bytes_stride_ / kFloatBytes;
    const int64_t floats = inner_floats + sums_floats + 2 * (bytes_floats + chunk_rows_);
    for_each_chunk(tokens_, chunk_rows_, floats, [&](int64_t begin, int64_t end, float* memory) {
      const int64_t count = end - begin;
      float* const bytes = memory + inner_floats + sums_floats;
      float* const scales = bytes + 2 * bytes_floats;
      Scratch scratch = {
          memory,
          memory + inner_floats,
          {reinterpret_cast<uint8_t*>(bytes), bytes_stride_, scales},
          {reinterpret_cast<uint8_t*>(bytes + bytes_floats), bytes_stride_, scales + chunk_rows_},
          false};
      for (size_t i = 0; i < ready.size(); ++i) {
        const Part* const following = i + 1 < ready.size() ? ready[i + 1] : next;
        finish(*ready[i], begin, count, scratch);
        norm(*ready[i], begin, count, following != nullptr ? &following->first : nullptr, scratch);
      }
      if (next != nullptr) project(*next, begin, count, scratch);
    });
  }

  // Computes the q|k|v of `count` rows.
  void project(const Part& part, int64_t begin, int64_t count, const Scratch& scratch) {
    const Linear& first = part.first;
    const int64_t width = first.fp32.out;
    float* const qkv = qkv_.mutable_data_ptr<float>();
    if (!attends_in_bf16(part, sequences_.head_dim)) {
      return first_linear(part, begin, count, Finish::kBias, qkv + begin * width, width, scratch);
    }
    const NarrowRows& x = narrow_x(first, begin, count, scratch);
    uint16_t* const rounded = reinterpret_cast<uint16_t*>(qkv) + begin * width;
    if (first.is_int8) {
      int8_kernels().linear_bf16(first.int8, x, count, rounded, width);
    } else {
      bf16_kernels()->linear_bf16(first.bf16, x, count, Finish::kBias, rounded, width);
    }
  }

  // Takes `count` rows through an FFN, or through what follows an attention's context, up to the LayerNorm.
  void finish(const Part& part, int64_t begin, int64_t count, Scratch& scratch) const {
    const Linear &first = part.first, &second = part.second;
    if (part.is_attention) {
      const float* context = context_.const_data_ptr<float>() + begin * part.width;
      return linear(second, context, part.width, count, Finish::kNothing, scratch.sums, sums_stride_,
                    scratch.middle);
    }
    if (first.is_int8 && second.is_int8) {
      int8_kernels().linear_gelu(first.int8, narrow_x(first, begin, count, scratch), count, scratch.inner,
                                 inner_stride_, scratch.middle);
    } else if (first.is_bf16() && second.is_bf16()) {
      bf16_kernels()->linear_bf16(first.bf16, narrow_x(first, begin, count, scratch), count,
                                  Finish::kBiasGelu, reinterpret_cast<uint16_t*>(scratch.middle.bytes),
                                  scratch.middle.stride / kBf16Bytes);
    } else {
      first_linear(part, begin, count, Finish::kBiasGelu, scratch.inner, inner_stride_, scratch);
      return linear(second, scratch.inner, inner_stride_, count, Finish::kNothing, scratch.sums, sums_stride_,
                    scratch.middle);
    }
    narrow_linear(second, scratch.middle, count, Finish::kNothing, scratch.sums, sums_stride_);
  }

  // x = LayerNorm(sums + bias + x), in place: the sum of a row is complete before the row is written. A row
  // becomes narrow, for the linear that takes it next, while it is in L1.
  void norm(const Part& part, int64_t begin, int64_t count, const Linear* following, Scratch& scratch) const {
    const bool narrow = following != nullptr && following->is_narrow();
    for (int64_t row = 0; row < count; ++row) {
      float* const x = x_ + (begin + row) * hidden_;
      // The bias is added first, as in the reference.
      kernels().layer_norm_row(part.norm, scratch.sums + row * sums_stride_, part.second.fp32.bias, x, x);
      if (narrow) make_narrow(*following, x, hidden_, 1, scratch.x.from(row));
    }
    scratch.x_is_narrow = narrow;
  }

  // The rows of x as the linear takes them: the LayerNorm made them, or this does.
  const NarrowRows& narrow_x(const Linear& linear, int64_t begin, int64_t count,
                             const Scratch& scratch) const {
    if (!scratch.x_is_narrow) make_narrow(linear, x_ + begin * hidden_, hidden_, count, scratch.x);
    return scratch.x;
  }

  void first_linear(const Part& part, int64_t begin, int64_t rows, Finish finish, float* out,
                    int64_t out_stride, const Scratch& scratch) const {
    if (part.first.is_narrow()) {
      return narrow_linear(part.first, narrow_x(part.first, begin, rows, scratch), rows, finish, out,
                           out_stride);
    }
    kernels().linear(part.first.fp32, x_ + begin * hidden_, hidden_, rows, finish, out, out_stride);
  }

  // In any dtype. room: for the rows, where the linear takes them narrow.
  static void linear(const Linear& part, const float* x, int64_t x_stride, int64_t rows, Finish finish,
                     float* out, int64_t out_stride, const NarrowRows& room) {
    if (!part.is_narrow()) {
      return kernels().linear(part.fp32, x, x_stride, rows, finish, out, out_stride);
    }
    make_narrow(part, x, x_stride, rows, room);
    narrow_linear(part, room, rows, finish, out, out_stride);
  }

  static void make_narrow(const Linear& part, const float* x, int64_t x_stride, int64_t rows,
                          const NarrowRows& to) {
    if (part.is_int8) return int8_kernels().quantize(x, x_stride, rows, part.int8.in, to);
    bf16_kernels()->round(x, x_stride, rows, part.bf16.in, reinterpret_cast<uint16_t*>(to.bytes),
                          to.stride / kBf16Bytes);
  }

  static void narrow_linear(const Linear& part, const NarrowRows& x, int64_t rows, Finish finish, float* out,
                            int64_t out_stride) {
    if (part.is_int8) return int8_kernels().linear(part.int8, x, rows, finish, out, out_stride);
    bf16_kernels()->linear(part.bf16, x, rows, finish, out, out_stride);
  }

  void attend(const Part& part) {
    AttentionArgs args = sequences_;
    args.qkv = qkv_.const_data_ptr<float>();
    args.row_stride = part.first.fp32.out;
    args.num_heads = part.width / args.head_dim;
    args.context = context_.mutable_data_ptr<float>();
    run_attention(attends_in_bf16(part, args.head_dim) ? bf16_kernels()->attention : kernels().attention,
                  args);
  }

  const Parts& parts_;
  const AttentionArgs sequences_;  // without qkv, its stride, num_heads and context: a part has its own
  const int64_t hidden_, tokens_;
  float* const x_;
  const int64_t chunk_rows_, inner_stride_, sums_stride_, bytes_stride_;
  at::Tensor qkv_, context_;
};

}  // namespace

at::Tensor encoder(const at::Tensor& x, const at::Tensor& cu_seqlens, int64_t max_seqlen,
                   at::TensorList weights, at::IntArrayRef widths, int64_t head_dim, double eps) {
  check::matrix(kOp, "x", x);
  TORCH_CHECK(head_dim >= 1, kOp, ": head_dim is ", head_dim, ", at least 1 is needed");
  check::cu_seqlens_type(kOp, cu_seqlens);
  const int64_t tokens = x.size(0);
  const int64_t hidden = x.size(1);
  const int64_t batch = cu_seqlens.size(0) - 1;
  const at::Tensor bounds = cu_seqlens.contiguous();
  const int32_t* bounds_data = bounds.const_data_ptr<int32_t>();
  const int64_t longest = check::seqlens(kOp, bounds_data, batch, tokens, max_seqlen);
  const Parts parts(weights, widths, hidden, head_dim, eps);
  at::Tensor out = at::empty({tokens, hidden}, x.options());
  out.copy_(x);
  // Whole sequences of about so many tokens go through all parts together, so that q|k|v and context
  // stay in the cache between the linears and the attention.
  const bool narrow = std::any_of(parts.list().begin(), parts.list().end(),
                                  [&](const Part& part) { return attends_in_bf16(part, head_dim); });
  const int64_t of_thread = parts.chunk_rows() == kAmxChunkRows ? kAmxGroupTokens : kNarrowGroupTokens;
  const int64_t group_tokens = narrow ? of_thread * at::get_num_threads() : kGroupTokens;
  const int64_t groups = (tokens + group_tokens - 1) / group_tokens;
  std::vector<int32_t> group_bounds;
  int64_t first = 0;
  for (int64_t group = 1; group <= groups; ++group) {
    int64_t last = first;
    while (last < batch && bounds_data[last] < tokens * group / groups) ++last;
    const int64_t begin = bounds_data[first];
    const int64_t count = bounds_data[last] - begin;
    group_bounds.assign(bounds_data + first, bounds_data + last + 1);
    for (int32_t& bound : group_bounds) bound -= static_cast<int32_t>(begin);
    if (count > 0) {
      at::Tensor rows = out.narrow(0, begin, count);
      Run(parts, {nullptr, 0, group_bounds.data(), last - first, 0, head_dim, longest, nullptr}, hidden, rows)
          .all();
    }
    first = last;
  }
  return out;
}

}  // namespace pruned_ops::cpu

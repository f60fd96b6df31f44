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
#include <optional>
#include <vector>

#include "check.h"
#include "cpu/attention.h"
#include "cpu/encoder_parts.h"
#include "cpu/kernels.h"
#include "cpu/layer_norm.h"
#include "cpu/shares.h"

namespace pruned_ops::cpu {

namespace {

using namespace encoder_parts;

constexpr int64_t kBf16Bytes = sizeof(uint16_t);
// Against all tokens at once: 3% to 5% less time on MiniLM (6% to 8% in int8), 1% to 3% on BERT-base, from
// 1500 tokens on; 2048 gains half of it, 768 loses it again.
constexpr int64_t kGroupTokens = 1024;
// Where q|k|v are in bf16, for each thread: 2% less time than with 1024, on MiniLM and BERT-base; 256 is no
// better.
constexpr int64_t kNarrowGroupTokens = 512;
// The same where AMX multiplies all products: up to a seventh less time than with 512 on MiniLM, up to a
// tenth on BERT-base, and with sequences of 384 tokens none beyond the noise. Weights are read once a chunk
// anyway.
constexpr int64_t kAmxGroupTokens = kAmxChunkRows;
// With fewer rows per thread the weights would be read too often for what is computed with them.
constexpr int64_t kLeastRows = 8;

// Floats from one row to the next of a scratch matrix: whole vectors, and an odd number of cache lines, so
// that the rows of a block lie in different sets of the cache.
int64_t scratch_stride(int64_t columns) {
  return ((columns + 15) / 16 | 1) * 16;
}

// Calls run(begin, end, scratch) for the rows of a batch: every thread has an even share of them, in chunks
// of at most chunk_rows. scratch: scratch_floats floats of this thread's own, aligned to 64 bytes.
template <typename Run>
void for_each_chunk(int64_t rows, int64_t chunk_rows, int64_t scratch_floats, const Run& run) {
  if (rows == 0) return;
  const int64_t shares = std::clamp<int64_t>(rows / kLeastRows, 1, at::get_num_threads());
  const int64_t largest = (rows + shares - 1) / shares;
  const int64_t chunks = (largest + chunk_rows - 1) / chunk_rows;
  const int64_t stride = (scratch_floats + 15) / 16 * 16;
  const at::DataPtr scratch =
      c10::GetCPUAllocator()->allocate(static_cast<size_t>(shares * stride) * sizeof(float));
  float* first_scratch = static_cast<float*>(scratch.get());
  for_each_piece(shares, chunks, [&](int64_t thread, int64_t share, int64_t chunk) {
    const int64_t begin = rows * share / shares;
    const int64_t count = rows * (share + 1) / shares - begin;
    run(begin + count * chunk / chunks, begin + count * (chunk + 1) / chunks,
        first_scratch + thread * stride);
  });
}

// A thread's scratch, cut into what a chunk of rows needs.
struct Scratch {
  float* inner;        // the FFN's activations
  float* sums;         // the second linear's output, which the LayerNorm takes
  float* normed;       // what a LayerNorm before a part makes of x
  const float* taken;  // what the next first linear takes: x or `normed`
  int64_t taken_stride;
  NarrowRows x;       // the same, quantised or rounded
  NarrowRows middle;  // what a second linear takes, quantised or rounded
  bool x_is_narrow;   // by the LayerNorm that wrote it
};

class Run {
 public:
  // first_token: of the group, in the whole batch.
  Run(const Parts& parts, const LayerNormArgs* final_norm, AttentionArgs sequences, int64_t first_token,
      at::Tensor& x)
      : parts_(parts),
        final_norm_(final_norm),
        sequences_(sequences),
        first_token_(first_token),
        hidden_(x.size(1)),
        tokens_(x.size(0)),
        x_(x.mutable_data_ptr<float>()),
        chunk_rows_(parts.chunk_rows()),
        inner_stride_(scratch_stride(parts.widest_ffn())),
        sums_stride_(scratch_stride(hidden_)),
        bytes_stride_(kFloatBytes * scratch_stride(parts.widest_narrow())),
        qkv_(at::empty({tokens_, 3 * parts.widest_attention()}, x.options())),
        context_(at::empty({tokens_, parts.widest_attention()}, x.options())) {}

  void all() {
    std::vector<const Part*> ready;  // parts whose rows no longer wait for an attention
    for (const Part& part : parts_.list()) {
      if (part.is_attention) {
        rows(ready, part.width > 0 ? &part : nullptr, false);
        ready.clear();
        if (part.width > 0) attend(part);
      }
      ready.push_back(&part);
    }
    rows(ready, nullptr, true);
  }

 private:
  // Takes all rows through what the `ready` parts still have to do, then computes the q|k|v of `next`. last:
  // no part comes after.
  void rows(const std::vector<const Part*>& ready, const Part* next, bool last) {
    const LayerNormArgs* const final_norm = last ? final_norm_ : nullptr;
    if (ready.empty() && next == nullptr && final_norm == nullptr) return;
    const int64_t inner_floats = chunk_rows_ * inner_stride_;
    const int64_t sums_floats = chunk_rows_ * sums_stride_;
    const int64_t bytes_floats = chunk_rows_ * bytes_stride_ / kFloatBytes;
    const int64_t normed_floats = norm_first() ? sums_floats : 0;
    const int64_t floats = inner_floats + sums_floats + normed_floats + 2 * (bytes_floats + chunk_rows_);
    for_each_chunk(tokens_, chunk_rows_, floats, [&](int64_t begin, int64_t end, float* memory) {
      const int64_t count = end - begin;
      float* const normed = memory + inner_floats + sums_floats;
      float* const bytes = normed + normed_floats;
      float* const scales = bytes + 2 * bytes_floats;
      Scratch scratch = {
          memory,
          memory + inner_floats,
          normed,
          x_ + begin * hidden_,
          hidden_,
          {reinterpret_cast<uint8_t*>(bytes), bytes_stride_, scales},
          {reinterpret_cast<uint8_t*>(bytes + bytes_floats), bytes_stride_, scales + chunk_rows_},
          false};
      // What follows an attention takes its context; other parts take x, which may have to be normed first.
      const Part* const entered = ready.empty() ? next : ready[0]->is_attention ? nullptr : ready[0];
      if (norm_first() && entered != nullptr) enter(*entered, begin, count, scratch);
      for (size_t i = 0; i < ready.size(); ++i) {
        finish(*ready[i], begin, count, scratch);
        norm(*ready[i], begin, count, i + 1 < ready.size() ? ready[i + 1] : next, scratch);
      }
      if (next != nullptr) project(*next, begin, count, scratch);
      for (int64_t row = 0; final_norm != nullptr && row < count; ++row) {
        float* const x = x_ + (begin + row) * hidden_;
        kernels().layer_norm_row(*final_norm, x, nullptr, nullptr, x);
      }
    });
  }

  // Computes the q|k|v of `count` rows, with query and key rotated.
  void project(const Part& part, int64_t begin, int64_t count, const Scratch& scratch) {
    const Linear& first = part.first;
    const int64_t width = first.fp32.out, head_dim = sequences_.head_dim;
    const float* const cos_sin =
        part.cos_sin == nullptr ? nullptr : part.cos_sin + (first_token_ + begin) * head_dim;
    const int64_t turned = cos_sin == nullptr ? 0 : count;  // rows
    const int64_t heads = 2 * part.width / head_dim;        // of query and key
    float* const qkv = qkv_.mutable_data_ptr<float>();
    if (!attends_in_bf16(part, head_dim)) {
      first_linear(part, count, Finish::kBias, qkv + begin * width, width, scratch);
      for (int64_t row = 0; row < turned; ++row) {
        kernels().rotate_row(qkv + (begin + row) * width, heads, head_dim, cos_sin + row * head_dim);
      }
      return;
    }
    const NarrowRows& x = narrow_x(first, count, scratch);
    uint16_t* const rounded = reinterpret_cast<uint16_t*>(qkv) + begin * width;
    if (first.is_int8) {
      int8_kernels().linear_bf16(first.int8, x, count, rounded, width);
    } else {
      bf16_kernels()->linear_bf16(first.bf16, x, count, Finish::kBias, rounded, width);
    }
    for (int64_t row = 0; row < turned; ++row) {
      bf16_kernels()->rotate_row(rounded + row * width, heads, head_dim, cos_sin + row * head_dim);
    }
  }

  // Takes `count` rows through an FFN, or through what follows an attention's context, up to the LayerNorm.
  void finish(const Part& part, int64_t begin, int64_t count, Scratch& scratch) const {
    const Linear &first = part.first, &second = part.second;
    const Finish activation = parts_.stack().gated ? Finish::kBiasGeglu : Finish::kBiasGelu;
    if (part.is_attention) {
      const float* context = context_.const_data_ptr<float>() + begin * part.width;
      return linear(second, context, part.width, count, Finish::kNothing, scratch.sums, sums_stride_,
                    scratch.middle);
    }
    if (first.is_int8 && second.is_int8) {
      int8_kernels().linear_gelu(first.int8, narrow_x(first, count, scratch), count, activation, part.width,
                                 scratch.inner, inner_stride_, scratch.middle);
    } else if (first.is_bf16() && second.is_bf16()) {
      bf16_kernels()->linear_bf16(first.bf16, narrow_x(first, count, scratch), count, activation,
                                  reinterpret_cast<uint16_t*>(scratch.middle.bytes),
                                  scratch.middle.stride / kBf16Bytes);
    } else {
      first_linear(part, count, activation, scratch.inner, inner_stride_, scratch);
      return linear(second, scratch.inner, inner_stride_, count, Finish::kNothing, scratch.sums, sums_stride_,
                    scratch.middle);
    }
    narrow_linear(second, scratch.middle, count, Finish::kNothing, scratch.sums, sums_stride_);
  }

  // x = LayerNorm(sums + bias + x), in place: the sum of a row is complete before the row is written. Where
  // LayerNorms come first, x = sums + bias + x, and the following part's LayerNorm is applied to that. A row
  // becomes narrow, for the linear that takes it next, while it is in L1.
  void norm(const Part& part, int64_t begin, int64_t count, const Part* following, Scratch& scratch) const {
    for (int64_t row = 0; row < count; ++row) {
      float* const x = x_ + (begin + row) * hidden_;
      const float* const sums = scratch.sums + row * sums_stride_;
      // The bias is added first, as in the reference.
      if (norm_first()) {
        kernels().add_row(hidden_, sums, part.second.fp32.bias, x, x);
      } else {
        kernels().layer_norm_row(part.norm, sums, part.second.fp32.bias, x, x);
      }
      if (following != nullptr) enter_row(*following, x, row, scratch);
    }
    entered(following, begin, scratch);
  }

  // Makes what the part's first linear takes of the rows of x.
  void enter(const Part& part, int64_t begin, int64_t count, Scratch& scratch) const {
    for (int64_t row = 0; row < count; ++row) enter_row(part, x_ + (begin + row) * hidden_, row, scratch);
    entered(&part, begin, scratch);
  }

  void enter_row(const Part& part, const float* x, int64_t row, const Scratch& scratch) const {
    if (norm_first() && part.has_norm()) {
      float* const normed = scratch.normed + row * sums_stride_;
      kernels().layer_norm_row(part.norm, x, nullptr, nullptr, normed);
      x = normed;
    }
    if (part.first.is_narrow()) make_narrow(part.first, x, hidden_, 1, scratch.x.from(row));
  }

  void entered(const Part* part, int64_t begin, Scratch& scratch) const {
    const bool normed = norm_first() && part != nullptr && part->has_norm();
    scratch.taken = normed ? scratch.normed : x_ + begin * hidden_;
    scratch.taken_stride = normed ? sums_stride_ : hidden_;
    scratch.x_is_narrow = part != nullptr && part->first.is_narrow();
  }

  // The rows that a first linear takes, as it takes them: the LayerNorm made them, or this does.
  const NarrowRows& narrow_x(const Linear& linear, int64_t count, const Scratch& scratch) const {
    if (!scratch.x_is_narrow) make_narrow(linear, scratch.taken, scratch.taken_stride, count, scratch.x);
    return scratch.x;
  }

  void first_linear(const Part& part, int64_t rows, Finish finish, float* out, int64_t out_stride,
                    const Scratch& scratch) const {
    if (part.first.is_narrow()) {
      return narrow_linear(part.first, narrow_x(part.first, rows, scratch), rows, finish, out, out_stride);
    }
    kernels().linear(part.first.fp32, scratch.taken, scratch.taken_stride, rows, finish, out, out_stride);
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
    args.window = part.window;
    args.bias = part.bias;
    args.reach = part.reach;
    args.relative = part.relative;
    run_attention(attends_in_bf16(part, args.head_dim) ? bf16_kernels()->attention : kernels().attention,
                  args);
  }

  bool norm_first() const { return parts_.stack().norm_first; }

  const Parts& parts_;
  const LayerNormArgs* const final_norm_;  // or null
  const AttentionArgs sequences_;  // without what each part has for itself: q|k|v, heads, context, bias
  const int64_t first_token_, hidden_, tokens_;
  float* const x_;
  const int64_t chunk_rows_, inner_stride_, sums_stride_, bytes_stride_;
  at::Tensor qkv_, context_;
};

}  // namespace

at::Tensor encoder(const at::Tensor& x, const at::Tensor& cu_seqlens, int64_t max_seqlen,
                   at::TensorList weights, at::IntArrayRef widths, int64_t head_dim, double eps,
                   bool norm_first, bool gated, const std::optional<at::Tensor>& positions,
                   const std::optional<at::Tensor>& rotary, const std::optional<at::IntArrayRef>& windows,
                   const std::optional<at::Tensor>& position_bias,
                   const std::optional<at::Tensor>& final_norm,
                   const std::optional<at::Tensor>& position_keys,
                   const std::optional<at::Tensor>& position_queries,
                   const std::optional<at::Tensor>& distance_rows) {
  check::matrix(kOp, "x", x);
  TORCH_CHECK(head_dim >= 1, kOp, ": head_dim is ", head_dim, ", at least 1 is needed");
  check::cu_seqlens_type(kOp, cu_seqlens);
  const int64_t tokens = x.size(0);
  const int64_t hidden = x.size(1);
  const int64_t batch = cu_seqlens.size(0) - 1;
  const at::Tensor bounds = cu_seqlens.contiguous();
  const int32_t* bounds_data = bounds.const_data_ptr<int32_t>();
  const int64_t longest = check::seqlens(kOp, bounds_data, batch, tokens, max_seqlen);
  const at::Tensor places = positions_of(positions, bounds_data, batch, tokens);
  if (positions) check::positions(kOp, places, bounds_data, batch, tokens);
  const Parts parts({hidden, head_dim, eps, norm_first, gated}, weights, widths,
                    {places, rotary, windows, position_bias, position_keys, position_queries, distance_rows});
  std::optional<Norm> last_norm;
  if (final_norm) {
    check::taken(kOp, "final_norm", *final_norm, {});
    TORCH_CHECK(final_norm->dim() == 2 && final_norm->size(0) == 2, kOp, ": final_norm has shape ",
                final_norm->sizes(), ", weight and bias [2, ", hidden, "] are needed");
    last_norm.emplace(kOp, final_norm->select(0, 0), final_norm->select(0, 1), hidden, eps);
  }
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
      AttentionArgs sequences = {nullptr, 0,      group_bounds.data(), last - first, 0, head_dim,
                                 longest, nullptr};
      if (positions) sequences.positions = places.const_data_ptr<int32_t>() + begin;
      Run(parts, last_norm ? &last_norm->args : nullptr, sequences, begin, rows).all();
    }
    first = last;
  }
  return out;
}

}  // namespace pruned_ops::cpu

// The whole encoder in one call. Between two attentions nothing needs other tokens, so a thread takes a chunk
// of rows through everything there is between them (output projection and LayerNorm, FFN, the next q|k|v)
// while the chunk is in its L2: the FFN's activations never leave it. The residual stream is updated in
// place.
#include "cpu/encoder.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "check.h"
#include "cpu/attention.h"
#include "cpu/layer_norm.h"
#include "cpu/linear.h"
#include "cpu/rows.h"

namespace pruned_ops::cpu {

namespace {

constexpr const char* kOp = "encoder";
constexpr int64_t kTensors = 6;  // of a part

struct Part {
  bool is_attention;
  int64_t width;  // of what lies between its linears: num_heads * head_dim, or the FFN width
  LinearArgs first, second;
  LayerNormArgs norm;
};

// Checks the parts' tensors and keeps those that had to be copied.
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

  // The widest q|k|v and context.
  int64_t widest_attention() const { return widest(true); }
  int64_t widest_ffn() const { return widest(false); }

 private:
  void add(at::TensorList weights, int64_t width, int64_t hidden, int64_t head_dim, double eps) {
    const bool is_attention = width >= 0;
    const int64_t inner = is_attention ? width * head_dim : -1 - width;
    const LinearArgs first = linear(weights[0], "first weight", weights[1], "first bias", hidden,
                                    is_attention ? 3 * inner : inner);
    const LinearArgs second = linear(weights[2], "second weight", weights[3], "second bias", inner, hidden);
    norms_.emplace_back(kOp, weights[4], weights[5], hidden, eps);
    list_.push_back({is_attention, inner, first, second, norms_.back().args});
  }

  LinearArgs linear(const at::Tensor& panels, const char* name, const at::Tensor& bias, const char* bias_name,
                    int64_t in, int64_t out) {
    check::panels(kOp, name, panels, in, out, kWeightPanel);
    check::vector(kOp, bias_name, bias, out);
    biases_.push_back(bias.contiguous());
    return {panels.const_data_ptr<float>(), biases_.back().const_data_ptr<float>(), in, out};
  }

  int64_t widest(bool is_attention) const {
    int64_t found = 0;
    for (const Part& part : list_) {
      if (part.is_attention == is_attention) found = std::max(found, part.width);
    }
    return found;
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
        inner_stride_(scratch_stride(parts.widest_ffn())),
        qkv_(at::empty({tokens_, 3 * parts.widest_attention()}, x.options())),
        context_(at::empty({tokens_, parts.widest_attention()}, x.options())) {}

  void all() {
    std::vector<const Part*> ready;  // parts that rows go through before the next attention
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
  // Takes all rows through what `ready` parts still have to do, and makes the q|k|v of `next`.
  void rows(const std::vector<const Part*>& ready, const Part* next) {
    if (ready.empty() && next == nullptr) return;
    const int64_t inner_floats = kChunkRows * inner_stride_;
    const int64_t scratch_floats = inner_floats + kChunkRows * scratch_stride(hidden_);
    for_each_chunk(tokens_, scratch_floats, [&](int64_t begin, int64_t end, float* scratch) {
      const int64_t count = end - begin;
      float* x = x_ + begin * hidden_;
      for (const Part* part : ready) {
        const float* inner = scratch;
        int64_t stride = inner_stride_;
        if (part->is_attention) {
          inner = context_.const_data_ptr<float>() + begin * part->width;
          stride = part->width;
        } else {
          kernels().linear(part->first, x, hidden_, count, Finish::kBiasGelu, scratch, inner_stride_);
        }
        linear_add_layer_norm_rows(part->second, part->norm, inner, stride, x, hidden_, count,
                                   scratch + inner_floats, x, hidden_);
      }
      if (next != nullptr) {
        kernels().linear(next->first, x, hidden_, count, Finish::kBias,
                         qkv_.mutable_data_ptr<float>() + begin * next->first.out, next->first.out);
      }
    });
  }

  void attend(const Part& part) {
    AttentionArgs args = sequences_;
    args.qkv = qkv_.const_data_ptr<float>();
    args.row_stride = part.first.out;
    args.num_heads = part.width / args.head_dim;
    args.context = context_.mutable_data_ptr<float>();
    run_attention(args);
  }

  const Parts& parts_;
  const AttentionArgs sequences_;  // qkv, its stride, num_heads and context are each part's
  const int64_t hidden_, tokens_;
  float* const x_;
  const int64_t inner_stride_;
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
  if (tokens > 0) {
    Run(parts, {nullptr, 0, bounds_data, batch, 0, head_dim, longest, nullptr}, hidden, out).all();
  }
  return out;
}

}  // namespace pruned_ops::cpu

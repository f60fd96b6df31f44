#include "cuda/ops.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <array>

#include "check.h"
#include "cuda/kernels.h"
#include "rows.h"

namespace pruned_ops::cuda {

namespace {

using check::as_int;
using check::Takes;

// What all tensors of an op are to be: what its first is, if kernels take that.
Takes as_first(const char* op, const at::Tensor& first) {
  const at::ScalarType dtype = first.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, op, ": the tensors are ",
              dtype, ", the kernel takes Float, Half or BFloat16");
  return {first.device(), dtype};
}

// The same of ops that multiply matrices: tensor cores have no float32.
Takes as_first_half(const char* op, const at::Tensor& first) {
  TORCH_CHECK(first.scalar_type() == at::kHalf || first.scalar_type() == at::kBFloat16, op,
              ": the tensors are ", first.scalar_type(), ", the kernel takes Half or BFloat16");
  return as_first(op, first);
}

Dtype kernel_dtype(const Takes& takes) {
  if (takes.dtype == at::kFloat) return Dtype::float32;
  return takes.dtype == at::kHalf ? Dtype::float16 : Dtype::bfloat16;
}

void hidden_fits(const char* op, int64_t hidden) {
  TORCH_CHECK(hidden <= kMaxHidden, op, ": hidden is ", hidden, ", the kernel takes at most ", kMaxHidden);
}

at::Tensor empty(int64_t rows, int64_t columns, const Takes& takes) {
  return at::empty({rows, columns}, at::TensorOptions().device(takes.device).dtype(takes.dtype));
}

// Rows that lie contiguous and begin at multiples of 16 bytes; a copy only if they do not.
at::Tensor with_aligned_rows(const at::Tensor& matrix) {
  constexpr int64_t bytes = 16;
  const at::Tensor rows = with_contiguous_rows(matrix);
  const bool is_aligned = reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % bytes == 0 &&
                          rows.stride(0) * rows.element_size() % bytes == 0;
  return is_aligned ? rows : rows.clone(at::MemoryFormat::Contiguous);
}

// start(stream) on this device and its current stream.
template <class Start>
void launch_on(const char* op, at::Device device, const Start& start) {
  const c10::cuda::CUDAGuard guard(device);
  const char* refused = start(c10::cuda::getCurrentCUDAStream(device.index()).stream());
  TORCH_CHECK(refused == nullptr, op, ": ", refused);
}

// A GEMM's operands, checked. What the pointers point into lives as long as this.
class Operands {
 public:
  Operands(const char* op, const at::Tensor& x, const at::Tensor& weight, const Takes& takes) {
    check::matrix(op, "weight", weight, takes);
    check::columns(op, "x", x, weight.size(1), takes);
    tokens = as_int(op, "the number of tokens", x.size(0));
    in = as_int(op, "x's width", x.size(1));
    width = as_int(op, "weight's width", weight.size(0));
    x_ = with_contiguous_rows(x);
    weight_ = with_contiguous_rows(weight);
  }

  Linear arguments(const void* bias, const at::Tensor& out, const Takes& takes) const {
    return {.x = x_.const_data_ptr(),
            .weight = weight_.const_data_ptr(),
            .bias = bias,
            .out = out.mutable_data_ptr(),
            .tokens = tokens,
            .in = in,
            .width = width,
            .stride_x = x_.stride(0),
            .stride_weight = weight_.stride(0),
            .dtype = kernel_dtype(takes)};
  }

  int tokens, in, width;

 private:
  at::Tensor x_, weight_;
};

// All of add_layer_norm but x, checked. What the pointers point into lives as long as this.
class AddedNorm {
 public:
  AddedNorm(const char* op, const std::optional<at::Tensor>& bias, const at::Tensor& residual,
            const at::Tensor& norm_weight, const at::Tensor& norm_bias, double eps, const Takes& takes)
      : takes_(takes), eps_(eps) {
    check::matrix(op, "residual", residual, takes);
    tokens = as_int(op, "the number of tokens", residual.size(0));
    hidden = as_int(op, "hidden", residual.size(1));
    hidden_fits(op, hidden);
    if (bias) check::vector(op, "bias", *bias, hidden, takes);
    check::vector(op, "norm_weight", norm_weight, hidden, takes);
    check::vector(op, "norm_bias", norm_bias, hidden, takes);
    check::eps(op, eps);
    if (bias) bias_ = bias->contiguous();
    residual_ = with_contiguous_rows(residual);
    weight_ = norm_weight.contiguous();
    norm_bias_ = norm_bias.contiguous();
  }

  // x: its rows contiguous.
  AddLayerNorm arguments(const at::Tensor& x, const at::Tensor& out) const {
    return {.x = x.const_data_ptr(),
            .bias = bias_.defined() ? bias_.const_data_ptr() : nullptr,
            .residual = residual_.const_data_ptr(),
            .norm_weight = weight_.const_data_ptr(),
            .norm_bias = norm_bias_.const_data_ptr(),
            .out = out.mutable_data_ptr(),
            .tokens = tokens,
            .hidden = hidden,
            .stride_x = x.stride(0),
            .stride_residual = residual_.stride(0),
            .eps = static_cast<float>(eps_),
            .dtype = kernel_dtype(takes_)};
  }

  int tokens, hidden;

 private:
  Takes takes_;
  double eps_;
  at::Tensor bias_, residual_, weight_, norm_bias_;
};

}  // namespace

at::Tensor attention(const at::Tensor& qkv, const at::Tensor& cu_seqlens, int64_t max_seqlen,
                     int64_t head_dim) {
  constexpr const char* kOp = "attention";
  const Takes takes = as_first_half(kOp, qkv);
  TORCH_CHECK(head_dim == 32 || head_dim == 64 || head_dim == 128, kOp, ": head_dim is ", head_dim,
              ", the kernel takes 32, 64 or 128");
  const int64_t num_heads = check::num_heads(kOp, qkv, head_dim, takes);
  check::cu_seqlens_type(kOp, cu_seqlens, takes.device);
  const int tokens = as_int(kOp, "the number of tokens", qkv.size(0));
  const int batch = as_int(kOp, "the number of sequences", cu_seqlens.size(0) - 1);
  TORCH_CHECK(max_seqlen >= 0, kOp, ": max_seqlen is ", max_seqlen, ", at least 0 is needed");
  // No sequence is longer than the tokens that there are, to which the kernel clamps lengths.
  const int longest = static_cast<int>(std::min<int64_t>(tokens, max_seqlen));

  at::Tensor out = empty(tokens, num_heads * head_dim, takes);
  if (out.numel() == 0) return out;
  if (longest == 0 || batch == 0) return out.zero_();
  const at::Tensor rows = with_aligned_rows(qkv);
  const at::Tensor bounds = cu_seqlens.contiguous();
  const Attention arguments = {.qkv = rows.const_data_ptr(),
                               .cu_seqlens = bounds.const_data_ptr<int32_t>(),
                               .out = out.mutable_data_ptr(),
                               .tokens = tokens,
                               .batch = batch,
                               .num_heads = as_int(kOp, "the number of heads", num_heads),
                               .head_dim = static_cast<int>(head_dim),
                               .max_seqlen = longest,
                               .stride_qkv = rows.stride(0),
                               .dtype = kernel_dtype(takes)};
  launch_on(kOp, takes.device, [&](void* stream) { return cuda::attention(arguments, stream); });
  return out;
}

at::Tensor linear_gelu(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  constexpr const char* kOp = "linear_gelu";
  const Takes takes = as_first_half(kOp, x);
  const Operands operands(kOp, x, weight, takes);
  check::vector(kOp, "bias", bias, operands.width, takes);

  at::Tensor out = empty(operands.tokens, operands.width, takes);
  if (out.numel() == 0) return out;
  if (operands.in == 0) return out.copy_(at::gelu(bias));  // a sum over nothing is 0
  const at::Tensor bias_row = bias.contiguous();
  const Linear arguments = operands.arguments(bias_row.const_data_ptr(), out, takes);
  launch_on(kOp, takes.device, [&](void* stream) { return cuda::linear_gelu(arguments, stream); });
  return out;
}

at::Tensor add_layer_norm(const at::Tensor& x, const std::optional<at::Tensor>& bias,
                          const at::Tensor& residual, const at::Tensor& norm_weight,
                          const at::Tensor& norm_bias, double eps) {
  constexpr const char* kOp = "add_layer_norm";
  const Takes takes = as_first(kOp, x);
  const AddedNorm norm(kOp, bias, residual, norm_weight, norm_bias, eps, takes);
  check::columns(kOp, "x", x, norm.hidden, takes);
  check::same_rows(kOp, x, norm.tokens);

  at::Tensor out = empty(norm.tokens, norm.hidden, takes);
  if (out.numel() == 0) return out;
  const at::Tensor rows = with_contiguous_rows(x);
  const AddLayerNorm arguments = norm.arguments(rows, out);
  launch_on(kOp, takes.device, [&](void* stream) { return cuda::add_layer_norm(arguments, stream); });
  return out;
}

at::Tensor linear_add_layer_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                                 const at::Tensor& residual, const at::Tensor& norm_weight,
                                 const at::Tensor& norm_bias, double eps) {
  constexpr const char* kOp = "linear_add_layer_norm";
  const Takes takes = as_first_half(kOp, x);
  const Operands operands(kOp, x, weight, takes);
  const AddedNorm norm(kOp, bias, residual, norm_weight, norm_bias, eps, takes);
  TORCH_CHECK(operands.width == norm.hidden, kOp, ": weight has ", operands.width, " rows, residual has ",
              norm.hidden, " columns");
  check::same_rows(kOp, x, norm.tokens);
  // A sum over nothing is 0: the bias alone is added, each row of x the same.
  if (operands.in == 0) {
    const at::Tensor product = bias.expand({norm.tokens, norm.hidden});
    return add_layer_norm(product, std::nullopt, residual, norm_weight, norm_bias, eps);
  }

  at::Tensor out = empty(norm.tokens, norm.hidden, takes);
  if (out.numel() == 0) return out;
  const at::Tensor product = empty(norm.tokens, norm.hidden, takes);
  const Linear linear = operands.arguments(nullptr, product, takes);
  const AddLayerNorm add = norm.arguments(product, out);
  launch_on(kOp, takes.device,
            [&](void* stream) { return cuda::linear_add_layer_norm(linear, add, stream); });
  return out;
}

at::Tensor embed_layer_norm(const at::Tensor& input_ids, const at::Tensor& position_ids,
                            const at::Tensor& token_type_ids, const at::Tensor& word,
                            const at::Tensor& position, const at::Tensor& token_type,
                            const at::Tensor& norm_weight, const at::Tensor& norm_bias, double eps) {
  constexpr const char* kOp = "embed_layer_norm";
  const Takes takes = as_first(kOp, word);
  TORCH_CHECK(input_ids.dim() == 1, kOp, ": input_ids has ", input_ids.dim(), " dimensions, 1 is needed");
  check::matrix(kOp, "word", word, takes);
  const int tokens = as_int(kOp, "the number of tokens", input_ids.size(0));
  const int hidden = as_int(kOp, "hidden", word.size(1));
  hidden_fits(kOp, hidden);
  check::vector(kOp, "norm_weight", norm_weight, hidden, takes);
  check::vector(kOp, "norm_bias", norm_bias, hidden, takes);
  check::eps(kOp, eps);

  EmbedLayerNorm arguments = {};
  std::array<at::Tensor, 3> ids = {input_ids, position_ids, token_type_ids};
  std::array<at::Tensor, 3> tables = {word, position, token_type};
  constexpr std::array ids_names = {"input_ids", "position_ids", "token_type_ids"};
  constexpr std::array table_names = {"word", "position", "token_type"};
  for (size_t i = 0; i < ids.size(); ++i) {
    check::ids_type(kOp, ids_names[i], ids[i], tokens, takes.device);
    check::columns(kOp, table_names[i], tables[i], hidden, takes);
    arguments.rows[i] = as_int(kOp, table_names[i], tables[i].size(0));
    // Ids are clamped to the rows that there are.
    TORCH_CHECK(arguments.rows[i] > 0 || tokens == 0, kOp, ": ", table_names[i], " has no row");
    ids[i] = ids[i].contiguous();
    tables[i] = with_contiguous_rows(tables[i]);
    arguments.ids[i] = ids[i].const_data_ptr();
    arguments.tables[i] = tables[i].const_data_ptr();
    arguments.strides[i] = tables[i].stride(0);
    arguments.wide_ids[i] = ids[i].scalar_type() == at::kLong;
  }

  at::Tensor out = empty(tokens, hidden, takes);
  if (out.numel() == 0) return out;
  const at::Tensor weight_row = norm_weight.contiguous();
  const at::Tensor bias_row = norm_bias.contiguous();
  arguments.norm_weight = weight_row.const_data_ptr();
  arguments.norm_bias = bias_row.const_data_ptr();
  arguments.out = out.mutable_data_ptr();
  arguments.tokens = tokens;
  arguments.hidden = hidden;
  arguments.eps = static_cast<float>(eps);
  arguments.dtype = kernel_dtype(takes);
  launch_on(kOp, takes.device, [&](void* stream) { return cuda::embed_layer_norm(arguments, stream); });
  return out;
}

}  // namespace pruned_ops::cuda

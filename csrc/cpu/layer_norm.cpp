#include "cpu/layer_norm.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "check.h"
#include "cpu/kernels.h"
#include "rows.h"

namespace pruned_ops::cpu {

namespace {

// Elements below which waking another thread costs more than it saves; ATen uses the same number.
constexpr int64_t kWorthAThread = 32768;

// A table of embeddings with one checked id per token.
struct Lookup {
  Lookup(const char* op, const char* ids_name, const at::Tensor& ids, int64_t tokens, const char* table_name,
         const at::Tensor& table, int64_t hidden) {
    check::ids_type(op, ids_name, ids, tokens);
    check::columns(op, table_name, table, hidden);
    ids_ = ids.to(at::kLong).contiguous();
    table_ = with_contiguous_rows(table);
    check::ids_within(op, ids_name, ids_.const_data_ptr<int64_t>(), tokens, table_name, table.size(0));
    id = ids_.const_data_ptr<int64_t>();
    first = table_.const_data_ptr<float>();
    stride = table_.stride(0);
  }

  const float* row(int64_t token) const { return first + id[token] * stride; }

  const int64_t* id;
  const float* first;
  int64_t stride;

 private:
  at::Tensor ids_, table_;  // what the pointers point into
};

// run(row) for every row, in parallel.
template <typename Run>
void for_each_row(int64_t rows, int64_t hidden, const Run& run) {
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / hidden);
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) run(row);
  });
}

}  // namespace

Norm::Norm(const char* op, const at::Tensor& norm_weight, const at::Tensor& norm_bias, int64_t hidden,
           double eps) {
  TORCH_CHECK(hidden >= 1, op, ": hidden is ", hidden, ", at least 1 is needed");
  check::vector(op, "norm_weight", norm_weight, hidden);
  check::vector(op, "norm_bias", norm_bias, hidden);
  check::eps(op, eps);
  weight = norm_weight.contiguous();
  bias = norm_bias.contiguous();
  args = {weight.const_data_ptr<float>(), bias.const_data_ptr<float>(), hidden, static_cast<float>(eps)};
}

at::Tensor add_layer_norm(const at::Tensor& x, const std::optional<at::Tensor>& bias,
                          const at::Tensor& residual, const at::Tensor& norm_weight,
                          const at::Tensor& norm_bias, double eps) {
  constexpr const char* kOp = "add_layer_norm";
  check::matrix(kOp, "residual", residual);
  const int64_t tokens = residual.size(0);
  const int64_t hidden = residual.size(1);
  check::columns(kOp, "x", x, hidden);
  check::same_rows(kOp, x, tokens);
  const Norm norm(kOp, norm_weight, norm_bias, hidden, eps);
  if (bias) check::vector(kOp, "bias", *bias, hidden);

  const at::Tensor x_rows = with_contiguous_rows(x);
  const at::Tensor residual_rows = with_contiguous_rows(residual);
  const at::Tensor bias_row = bias ? bias->contiguous() : at::Tensor();
  at::Tensor out = at::empty({tokens, hidden}, residual.options());

  const float* x_data = x_rows.const_data_ptr<float>();
  const float* residual_data = residual_rows.const_data_ptr<float>();
  const float* bias_data = bias ? bias_row.const_data_ptr<float>() : nullptr;
  const int64_t x_stride = x_rows.stride(0);
  const int64_t residual_stride = residual_rows.stride(0);
  float* out_data = out.mutable_data_ptr<float>();
  const Kernels& kernel = kernels();
  for_each_row(tokens, hidden, [&](int64_t row) {
    const float* added = residual_data + row * residual_stride;
    // Summed as the reference does: the bias first, where there is one.
    kernel.layer_norm_row(norm.args, x_data + row * x_stride, bias_data ? bias_data : added,
                          bias_data ? added : nullptr, out_data + row * hidden);
  });
  return out;
}

at::Tensor embed_layer_norm(const at::Tensor& input_ids, const at::Tensor& position_ids,
                            const at::Tensor& token_type_ids, const at::Tensor& word,
                            const at::Tensor& position, const at::Tensor& token_type,
                            const at::Tensor& norm_weight, const at::Tensor& norm_bias, double eps) {
  constexpr const char* kOp = "embed_layer_norm";
  TORCH_CHECK(input_ids.dim() == 1, kOp, ": input_ids has ", input_ids.dim(), " dimensions, 1 is needed");
  check::matrix(kOp, "word", word);
  const int64_t tokens = input_ids.size(0);
  const int64_t hidden = word.size(1);
  const Norm norm(kOp, norm_weight, norm_bias, hidden, eps);
  const Lookup words(kOp, "input_ids", input_ids, tokens, "word", word, hidden);
  const Lookup positions(kOp, "position_ids", position_ids, tokens, "position", position, hidden);
  const Lookup types(kOp, "token_type_ids", token_type_ids, tokens, "token_type", token_type, hidden);

  at::Tensor out = at::empty({tokens, hidden}, word.options());
  float* out_data = out.mutable_data_ptr<float>();
  const Kernels& kernel = kernels();
  for_each_row(tokens, hidden, [&](int64_t row) {
    // The order of the sum is BERT's.
    kernel.layer_norm_row(norm.args, words.row(row), types.row(row), positions.row(row),
                          out_data + row * hidden);
  });
  return out;
}

}  // namespace pruned_ops::cpu

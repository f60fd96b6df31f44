#include "cpu/attention.h"

#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "check.h"
#include "cpu/kernels.h"
#include "cpu/shares.h"
#include "rows.h"

namespace pruned_ops::cpu {

namespace {

constexpr const char* kOp = "attention";

// Waking the other threads costs some microseconds: about this many multiply-adds of one core.
constexpr int64_t kWorthAThread = 1 << 17;

// Pieces of a thread's share. A piece that begins within a head lays out its keys again: with three, heads
// are seldom cut where a model has 12.
constexpr int64_t kPieces = 3;

// Numbers to rotate that are worth one.
constexpr int64_t kRotatedByAThread = 1 << 15;

// A copy of q|k|v with query and key rotated.
at::Tensor rotated(const at::Tensor& qkv, int64_t num_heads, int64_t head_dim, const at::Tensor& angles) {
  at::Tensor rows = qkv.clone(at::MemoryFormat::Contiguous);
  float* const data = rows.mutable_data_ptr<float>();
  const float* const turns = angles.const_data_ptr<float>();
  const int64_t width = rows.size(1);
  at::parallel_for(
      0, rows.size(0), std::max<int64_t>(1, kRotatedByAThread / width), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          kernels().rotate_row(data + row * width, 2 * num_heads, head_dim, turns + row * head_dim);
        }
      });
  return rows;
}

// (heads, rows, head_dim) -> each head's rows as panels, the last filled up with zeros.
std::optional<at::Tensor> in_panels(const char* name, const std::optional<at::Tensor>& rows, int64_t heads,
                                    int64_t head_dim) {
  if (!rows) return std::nullopt;
  check::taken(kOp, name, *rows, {});
  TORCH_CHECK(rows->dim() == 3 && rows->size(0) == heads && rows->size(2) == head_dim, kOp, ": ", name,
              " has shape ", rows->sizes(), ", [", heads, ", rows, ", head_dim, "] is needed");
  const int64_t panels = (rows->size(1) + kWeightPanel - 1) / kWeightPanel;
  const at::Tensor filled = at::constant_pad_nd(*rows, {0, 0, 0, panels * kWeightPanel - rows->size(1)});
  return filled.view({heads, panels, kWeightPanel, head_dim}).transpose(2, 3).contiguous();
}

}  // namespace

// Splits the work evenly although lengths are unequal: the pieces cut an axis of cost, on which a query row
// is as long as its sequence has keys, and a task belongs to the piece that holds its start. The cut decides
// which thread computes a row, never how, so the result does not depend on the number of threads.
void run_attention(const AttentionKernel& kernel, const AttentionArgs& args) {
  int64_t cost = 0;
  for (int64_t i = 0; i < args.batch; ++i) {
    const int64_t seqlen = args.cu_seqlens[i + 1] - args.cu_seqlens[i];
    cost += args.num_heads * seqlen * row_cost(args, seqlen);
  }
  if (cost == 0) return;
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / args.head_dim);
  const int64_t shares = std::clamp<int64_t>((cost + grain - 1) / grain, 1, at::get_num_threads());
  const int64_t pieces = shares == 1 ? 1 : kPieces;
  const int64_t stride = (kernel.scratch(args) + 15) / 16 * 16;
  const at::DataPtr scratch =  // 64-byte aligned
      c10::GetCPUAllocator()->allocate(static_cast<size_t>(shares * stride) * sizeof(float));
  float* first_scratch = static_cast<float*>(scratch.get());
  for_each_piece(shares, pieces, [&](int64_t thread, int64_t share, int64_t piece) {
    const int64_t number = share * pieces + piece, count = shares * pieces;
    kernel.run(args, cost * number / count, cost * (number + 1) / count, first_scratch + thread * stride);
  });
}

at::Tensor positions_of(const std::optional<at::Tensor>& given, const int32_t* bounds, int64_t batch,
                        int64_t tokens) {
  if (given) return given->contiguous();
  at::Tensor positions = at::empty({tokens}, at::kInt);
  int32_t* const data = positions.mutable_data_ptr<int32_t>();
  for (int64_t i = 0; i < batch; ++i) {
    for (int32_t token = bounds[i]; token < bounds[i + 1]; ++token) data[token] = token - bounds[i];
  }
  return positions;
}

at::Tensor cos_sin(const at::Tensor& positions, const at::Tensor& rotary) {
  const at::Tensor angles = positions.to(at::kFloat).unsqueeze(1).mul(rotary);
  return at::cat({angles.cos(), angles.sin()}, 1);
}

at::Tensor unscaled_bias(const at::Tensor& position_bias, int64_t head_dim, int64_t terms) {
  return position_bias.mul(std::sqrt(static_cast<double>(head_dim * terms))).contiguous();
}

Relative::Relative(const char* op, const std::optional<at::Tensor>& keys,
                   const std::optional<at::Tensor>& queries, const std::optional<at::Tensor>& distance_rows,
                   int64_t heads, int64_t head_dim) {
  TORCH_CHECK((keys || queries) == distance_rows.has_value(), op,
              ": distance_rows goes with position keys or position queries, and they with it");
  if (!distance_rows) return;
  rows = distance_rows->contiguous();
  for (const auto& [name, given, kept] : {std::tuple("position keys", &keys, &this->keys),
                                          std::tuple("position queries", &queries, &this->queries)}) {
    if (!*given) continue;
    *kept = **given;
    check::taken(op, name, *kept, {});
    TORCH_CHECK(kept->dim() == 4 && kept->size(0) == heads && kept->size(2) == head_dim &&
                    kept->size(3) == kWeightPanel && kept->is_contiguous(),
                op, ": the ", name, " have shape ", kept->sizes(), ", contiguous panels [", heads,
                ", panels, ", head_dim, ", ", kWeightPanel, "] are needed");
    TORCH_CHECK(args.rows == 0 || args.rows == kept->size(1) * kWeightPanel, op,
                ": position keys and position queries have different numbers of rows");
    args.rows = kept->size(1) * kWeightPanel;
  }
  args.reach = check::distance_rows(op, rows, args.rows);
  const int32_t* const values = rows.const_data_ptr<int32_t>();
  args.row_of_distance = values;
  args.is_gradual = true;
  for (int64_t i = 1; i < rows.numel(); ++i) args.is_gradual &= values[i] - values[i - 1] <= 1;
  args.keys = keys ? this->keys.const_data_ptr<float>() : nullptr;
  args.queries = queries ? this->queries.const_data_ptr<float>() : nullptr;
}

RelativeArgs Relative::from(int64_t head, int64_t head_dim) const {
  RelativeArgs moved = args;
  if (moved.keys != nullptr) moved.keys += head * args.rows * head_dim;
  if (moved.queries != nullptr) moved.queries += head * args.rows * head_dim;
  return moved;
}

at::Tensor attention(const at::Tensor& qkv, const at::Tensor& cu_seqlens, int64_t max_seqlen,
                     int64_t head_dim, const std::optional<at::Tensor>& positions,
                     const std::optional<at::Tensor>& rotary, std::optional<int64_t> window,
                     const std::optional<at::Tensor>& position_bias,
                     const std::optional<at::Tensor>& position_key,
                     const std::optional<at::Tensor>& position_query,
                     const std::optional<at::Tensor>& distance_rows) {
  const int64_t num_heads = check::num_heads(kOp, qkv, head_dim);
  check::cu_seqlens_type(kOp, cu_seqlens);
  const int64_t tokens = qkv.size(0);
  const int64_t batch = cu_seqlens.size(0) - 1;
  const at::Tensor bounds = cu_seqlens.contiguous();
  const int32_t* bounds_data = bounds.const_data_ptr<int32_t>();
  const int64_t longest = check::seqlens(kOp, bounds_data, batch, tokens, max_seqlen);

  const at::Tensor places = positions_of(positions, bounds_data, batch, tokens);
  if (positions) check::positions(kOp, places, bounds_data, batch, tokens);
  if (rotary) {
    TORCH_CHECK(head_dim % 2 == 0, kOp, ": head_dim is ", head_dim, ", and rotary takes channels in pairs");
    check::vector(kOp, "rotary", *rotary, head_dim / 2);
  }
  TORCH_CHECK(!window || *window >= 0, kOp, ": window is ", *window, ", at least 0 is needed");
  const int64_t reach = position_bias ? check::position_bias(kOp, *position_bias, num_heads) : 0;

  for (const auto& rows : {position_key, position_query}) {  // the last panel has rows that were not given
    if (rows && distance_rows && rows->dim() == 3) check::distance_rows(kOp, *distance_rows, rows->size(1));
  }
  const Relative relative(kOp, in_panels("position_key", position_key, num_heads, head_dim),
                          in_panels("position_query", position_query, num_heads, head_dim), distance_rows,
                          num_heads, head_dim);

  at::Tensor context = at::empty({tokens, num_heads * head_dim}, qkv.options());
  if (context.numel() == 0) return context;
  const at::Tensor rows =
      rotary ? rotated(qkv, num_heads, head_dim, cos_sin(places, *rotary)) : with_contiguous_rows(qkv);
  const at::Tensor bias =
      position_bias ? unscaled_bias(*position_bias, head_dim, relative.args.terms()) : at::Tensor();
  AttentionArgs args = {
      rows.const_data_ptr<float>(),     rows.stride(0), bounds_data, batch, num_heads, head_dim, longest,
      context.mutable_data_ptr<float>()};
  if (positions) args.positions = places.const_data_ptr<int32_t>();
  if (window) args.window = std::min<int64_t>(*window, std::numeric_limits<int32_t>::max());
  if (position_bias) args.bias = bias.const_data_ptr<float>();
  args.reach = reach;
  args.relative = relative.args;
  run_attention(kernels().attention, args);
  return context;
}

}  // namespace pruned_ops::cpu

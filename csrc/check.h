// Every check of an argument. A failed one raises an error with the argument's name and the numbers, and its
// message starts with the op: "attention: qkv has ...".
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "panels.h"

namespace pruned_ops::check {

// The device and dtype that a kernel takes.
struct Takes {
  at::Device device = at::kCPU;
  at::ScalarType dtype = at::kFloat;
};

inline void on(const char* op, const char* name, const at::Tensor& tensor, at::Device device) {
  TORCH_CHECK(tensor.device() == device, op, ": ", name, " is on ", tensor.device(), ", the kernel takes ",
              device);
}

inline void taken(const char* op, const char* name, const at::Tensor& tensor, const Takes& takes) {
  on(op, name, tensor, takes.device);
  TORCH_CHECK(tensor.scalar_type() == takes.dtype, op, ": ", name, " is ", tensor.scalar_type(),
              ", the kernel takes ", takes.dtype);
}

// A (rows, columns) tensor.
inline void matrix(const char* op, const char* name, const at::Tensor& tensor, const Takes& takes = {}) {
  taken(op, name, tensor, takes);
  TORCH_CHECK(tensor.dim() == 2, op, ": ", name, " has ", tensor.dim(), " dimensions, 2 are needed");
}

inline void columns(const char* op, const char* name, const at::Tensor& tensor, int64_t needed,
                    const Takes& takes = {}) {
  matrix(op, name, tensor, takes);
  TORCH_CHECK(tensor.size(1) == needed, op, ": ", name, " has ", tensor.size(1), " columns, ", needed,
              " are needed");
}

// A (size,) tensor.
inline void vector(const char* op, const char* name, const at::Tensor& tensor, int64_t size,
                   const Takes& takes = {}) {
  taken(op, name, tensor, takes);
  TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size, op, ": ", name, " has shape ", tensor.sizes(),
              ", [", size, "] is needed");
}

// A weight (out, in) in panels of so many steps, as panels.h draws them; kind: their dtype in words.
inline void in_panels(const char* op, const char* name, const at::Tensor& tensor, const char* kind,
                      int64_t steps, int64_t width, int64_t in, int64_t out) {
  on(op, name, tensor, at::kCPU);
  const int64_t panels = (out + kWeightPanel - 1) / kWeightPanel;
  TORCH_CHECK(
      tensor.dim() == 3 && tensor.size(0) == panels && tensor.size(1) == steps && tensor.size(2) == width, op,
      ": ", name, " has shape ", tensor.sizes(), ", ", kind, "panels [", panels, ", ", steps, ", ", width,
      "] of a weight [", out, ", ", in, "] are needed");
  TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " is not contiguous; panels must be");
}

// fp32 panels (ceil(out / 32), in, 32).
inline void panels(const char* op, const char* name, const at::Tensor& tensor, int64_t in, int64_t out) {
  taken(op, name, tensor, {});
  in_panels(op, name, tensor, "", in, kWeightPanel, in, out);
}

// int8 panels (ceil(out / 32), 1 + ceil(in / 4), 128).
inline void int8_panels(const char* op, const char* name, const at::Tensor& tensor, int64_t in, int64_t out) {
  TORCH_CHECK(in <= kMostInt8Inputs, op, ": ", name, " has ", in, " inputs, and sums in int8 hold ",
              kMostInt8Inputs, ": keep it in float32");
  in_panels(op, name, tensor, "int8 ", 1 + (in + kInt8Group - 1) / kInt8Group, kStepBytes, in, out);
}

// bf16 panels (ceil(out / 32), ceil(in / 2), 64).
inline void bf16_panels(const char* op, const char* name, const at::Tensor& tensor, int64_t in, int64_t out) {
  in_panels(op, name, tensor, "bf16 ", (in + kBf16Group - 1) / kBf16Group, kWeightPanel * kBf16Group, in,
            out);
}

// Checks a q|k|v (tokens, 3 * num_heads * head_dim); returns num_heads.
inline int64_t num_heads(const char* op, const at::Tensor& qkv, int64_t head_dim, const Takes& takes = {}) {
  matrix(op, "qkv", qkv, takes);
  TORCH_CHECK(head_dim >= 1, op, ": head_dim is ", head_dim, ", at least 1 is needed");
  TORCH_CHECK(qkv.size(1) % 3 == 0 && qkv.size(1) / 3 % head_dim == 0, op, ": qkv has ", qkv.size(1),
              " columns, which is not a multiple of 3 * head_dim (3 * ", head_dim, ")");
  return qkv.size(1) / 3 / head_dim;
}

inline void cu_seqlens_type(const char* op, const at::Tensor& cu_seqlens, at::Device device = at::kCPU) {
  on(op, "cu_seqlens", cu_seqlens, device);
  TORCH_CHECK(cu_seqlens.scalar_type() == at::kInt, op, ": cu_seqlens is ", cu_seqlens.scalar_type(),
              ", Int (int32) is needed");
  TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, op, ": cu_seqlens has shape ",
              cu_seqlens.sizes(), ", [batch + 1] is needed");
}

// bounds: the batch + 1 values of cu_seqlens. Returns the number of tokens of the longest sequence.
inline int64_t seqlens(const char* op, const int32_t* bounds, int64_t batch, int64_t tokens,
                       int64_t max_seqlen) {
  TORCH_CHECK(max_seqlen >= 0, op, ": max_seqlen is ", max_seqlen, ", at least 0 is needed");
  TORCH_CHECK(bounds[0] == 0, op, ": cu_seqlens starts at ", bounds[0], ", not at 0");
  int64_t longest = 0;
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t seqlen = static_cast<int64_t>(bounds[i + 1]) - bounds[i];
    TORCH_CHECK(seqlen >= 0, op, ": cu_seqlens decreases from ", bounds[i], " to ", bounds[i + 1],
                " at index ", i + 1);
    TORCH_CHECK(seqlen <= max_seqlen, op, ": sequence ", i, " has ", seqlen, " tokens, max_seqlen is ",
                max_seqlen);
    longest = std::max(longest, seqlen);
  }
  TORCH_CHECK(bounds[batch] == tokens, op, ": cu_seqlens ends at ", bounds[batch], ", there are ", tokens,
              " rows");
  return longest;
}

// Contiguous int32 (tokens,), rising from at least 0 within each of the sequences of these bounds.
inline void positions(const char* op, const at::Tensor& tensor, const int32_t* bounds, int64_t batch,
                      int64_t tokens) {
  on(op, "positions", tensor, at::kCPU);
  TORCH_CHECK(tensor.scalar_type() == at::kInt, op, ": positions is ", tensor.scalar_type(),
              ", Int (int32) is needed");
  TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == tokens, op, ": positions has shape ", tensor.sizes(),
              ", [", tokens, "] is needed");
  const int32_t* const values = tensor.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < batch; ++i) {
    int64_t least = 0;
    for (int64_t token = bounds[i]; token < bounds[i + 1]; ++token) {
      TORCH_CHECK(values[token] >= least, op,
                  ": positions must be at least 0 and rise within each sequence; that of token ", token,
                  " is ", values[token]);
      least = int64_t{values[token]} + 1;
    }
  }
}

// A (num_heads, 2 * reach + 1) tensor; returns reach.
inline int64_t position_bias(const char* op, const at::Tensor& tensor, int64_t num_heads) {
  taken(op, "position_bias", tensor, {});
  TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == num_heads && tensor.size(1) % 2 == 1, op,
              ": position_bias has shape ", tensor.sizes(), ", [", num_heads,
              ", 2 * reach + 1] is needed, a row for each head");
  return tensor.size(1) / 2;
}

// The rows, of so many, that distances of a key from its query have: int32 (2 * reach + 1,), never falling.
// Returns reach.
inline int64_t distance_rows(const char* op, const at::Tensor& tensor, int64_t rows) {
  on(op, "distance_rows", tensor, at::kCPU);
  TORCH_CHECK(tensor.scalar_type() == at::kInt && tensor.dim() == 1 && tensor.size(0) % 2 == 1, op,
              ": distance_rows is ", tensor.scalar_type(), " ", tensor.sizes(),
              ", Int (int32) [2 * reach + 1] is needed");
  const at::Tensor contiguous = tensor.contiguous();
  const int32_t* const values = contiguous.const_data_ptr<int32_t>();
  TORCH_CHECK(
      values[0] >= 0 && values[tensor.size(0) - 1] < rows && std::is_sorted(values, values + tensor.size(0)),
      op, ": distance_rows must lie between 0 and ", rows - 1, ", and never fall");
  return tensor.size(0) / 2;
}

inline void eps(const char* op, double value) {
  TORCH_CHECK(value >= 0, op, ": eps is ", value, ", at least 0 is needed");
}

// x must have as many rows as the residual that it is added to.
inline void same_rows(const char* op, const at::Tensor& x, int64_t rows) {
  TORCH_CHECK(x.size(0) == rows, op, ": x has ", x.size(0), " rows, residual has ", rows);
}

// Returns a size or count as an int, with which the CUDA kernels count.
inline int as_int(const char* op, const char* name, int64_t value) {
  constexpr int most = std::numeric_limits<int>::max();
  TORCH_CHECK(value >= 0 && value <= most, op, ": ", name, " is ", value, ", the kernel takes 0 to ", most);
  return static_cast<int>(value);
}

inline void ids_type(const char* op, const char* name, const at::Tensor& ids, int64_t tokens,
                     at::Device device = at::kCPU) {
  on(op, name, ids, device);
  TORCH_CHECK(ids.scalar_type() == at::kInt || ids.scalar_type() == at::kLong, op, ": ", name, " is ",
              ids.scalar_type(), ", Int (int32) or Long (int64) is needed");
  TORCH_CHECK(ids.dim() == 1 && ids.size(0) == tokens, op, ": ", name, " has shape ", ids.sizes(), ", [",
              tokens, "] is needed");
}

// values: the ids, each of which selects a row of the table.
inline void ids_within(const char* op, const char* name, const int64_t* values, int64_t count,
                       const char* table, int64_t rows) {
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK_INDEX(values[i] >= 0 && values[i] < rows, op, ": ", name, "[", i, "] is ", values[i], ", ",
                      table, " has ", rows, " rows");
  }
}

}  // namespace pruned_ops::check

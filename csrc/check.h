// Every refusal of a tensor, with its name and numbers. Messages start with the op: "attention: qkv has ...".
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>

#include "cpu/kernels.h"

namespace pruned_ops::check {

inline void cpu(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK(tensor.device().is_cpu(), op, ": ", name, " is on ", tensor.device(),
              ", the kernel takes the CPU");
}

inline void cpu_float(const char* op, const char* name, const at::Tensor& tensor) {
  cpu(op, name, tensor);
  TORCH_CHECK(tensor.scalar_type() == at::kFloat, op, ": ", name, " is ", tensor.scalar_type(),
              ", the kernel takes Float (float32)");
}

// A float32 (rows, columns) tensor on the CPU.
inline void matrix(const char* op, const char* name, const at::Tensor& tensor) {
  cpu_float(op, name, tensor);
  TORCH_CHECK(tensor.dim() == 2, op, ": ", name, " has ", tensor.dim(), " dimensions, 2 are needed");
}

inline void columns(const char* op, const char* name, const at::Tensor& tensor, int64_t needed) {
  matrix(op, name, tensor);
  TORCH_CHECK(tensor.size(1) == needed, op, ": ", name, " has ", tensor.size(1), " columns, ", needed,
              " are needed");
}

// A float32 (size,) tensor on the CPU.
inline void vector(const char* op, const char* name, const at::Tensor& tensor, int64_t size) {
  cpu_float(op, name, tensor);
  TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size, op, ": ", name, " has shape ", tensor.sizes(),
              ", [", size, "] is needed");
}

// A weight (out, in) as panels (ceil(out / 32), in, 32).
inline void panels(const char* op, const char* name, const at::Tensor& tensor, int64_t in, int64_t out) {
  constexpr int64_t width = kWeightPanel;
  cpu_float(op, name, tensor);
  const int64_t needed = (out + width - 1) / width;
  TORCH_CHECK(
      tensor.dim() == 3 && tensor.size(0) == needed && tensor.size(1) == in && tensor.size(2) == width, op,
      ": ", name, " has shape ", tensor.sizes(), ", panels [", needed, ", ", in, ", ", width,
      "] of a weight [", out, ", ", in, "] are needed");
  TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " is not contiguous; panels must be");
}

// A weight (out, in) in int8 as panels; see Int8LinearArgs.
inline void int8_panels(const char* op, const char* name, const at::Tensor& tensor, int64_t in, int64_t out) {
  cpu(op, name, tensor);
  const int64_t panels = (out + kWeightPanel - 1) / kWeightPanel;
  const int64_t steps = 1 + (in + kInt8Group - 1) / kInt8Group;
  TORCH_CHECK(tensor.dim() == 3 && tensor.size(0) == panels && tensor.size(1) == steps &&
                  tensor.size(2) == kStepBytes,
              op, ": ", name, " has shape ", tensor.sizes(), ", int8 panels [", panels, ", ", steps, ", ",
              kStepBytes, "] of a weight [", out, ", ", in, "] are needed");
  TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " is not contiguous; panels must be");
}

// Returns the number of heads in a q|k|v of this width.
inline int64_t num_heads(const char* op, const at::Tensor& qkv, int64_t head_dim) {
  matrix(op, "qkv", qkv);
  TORCH_CHECK(head_dim >= 1, op, ": head_dim is ", head_dim, ", at least 1 is needed");
  TORCH_CHECK(qkv.size(1) % 3 == 0 && qkv.size(1) / 3 % head_dim == 0, op, ": qkv has ", qkv.size(1),
              " columns, which is not a multiple of 3 * head_dim (3 * ", head_dim, ")");
  return qkv.size(1) / 3 / head_dim;
}

inline void cu_seqlens_type(const char* op, const at::Tensor& cu_seqlens) {
  cpu(op, "cu_seqlens", cu_seqlens);
  TORCH_CHECK(cu_seqlens.scalar_type() == at::kInt, op, ": cu_seqlens is ", cu_seqlens.scalar_type(),
              ", Int (int32) is needed");
  TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, op, ": cu_seqlens has shape ",
              cu_seqlens.sizes(), ", [batch + 1] is needed");
}

// bounds: the values of cu_seqlens, batch + 1 of them. Returns the tokens of the longest sequence.
inline int64_t seqlens(const char* op, const int32_t* bounds, int64_t batch, int64_t tokens,
                       int64_t max_seqlen) {
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

inline void eps(const char* op, double value) {
  TORCH_CHECK(value >= 0, op, ": eps is ", value, ", at least 0 is needed");
}

inline void ids_type(const char* op, const char* name, const at::Tensor& ids, int64_t tokens) {
  cpu(op, name, ids);
  TORCH_CHECK(ids.scalar_type() == at::kInt || ids.scalar_type() == at::kLong, op, ": ", name, " is ",
              ids.scalar_type(), ", Int (int32) or Long (int64) is needed");
  TORCH_CHECK(ids.dim() == 1 && ids.size(0) == tokens, op, ": ", name, " has shape ", ids.sizes(), ", [",
              tokens, "] is needed");
}

// values: the ids, each of which selects a row of a table.
inline void ids_within(const char* op, const char* name, const int64_t* values, int64_t count,
                       const char* table, int64_t rows) {
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK_INDEX(values[i] >= 0 && values[i] < rows, op, ": ", name, "[", i, "] is ", values[i], ", ",
                      table, " has ", rows, " rows");
  }
}

}  // namespace pruned_ops::check

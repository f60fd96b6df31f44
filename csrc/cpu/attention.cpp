#include "cpu/attention.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>

#include "check.h"
#include "cpu/kernels.h"
#include "rows.h"

namespace pruned_ops::cpu {

namespace {

constexpr const char* kOp = "attention";

// Waking the other threads costs some microseconds: about this many multiply-adds of one core.
constexpr int64_t kWorthAThread = 1 << 17;

}  // namespace

// Splits the work evenly although lengths are unequal: parallel_for cuts an axis of cost, on which a query
// row is as long as its sequence has keys, and a task belongs to the thread whose share holds its start. The
// cut decides which thread computes a row, never how, so the result does not depend on the number of threads.
void run_attention(const AttentionKernel& kernel, const AttentionArgs& args) {
  int64_t cost = 0;
  for (int64_t i = 0; i < args.batch; ++i) {
    const int64_t seqlen = args.cu_seqlens[i + 1] - args.cu_seqlens[i];
    cost += args.num_heads * seqlen * seqlen;
  }
  const size_t scratch_bytes = static_cast<size_t>(kernel.scratch(args)) * sizeof(float);
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / args.head_dim);
  at::parallel_for(0, cost, grain, [&](int64_t begin, int64_t end) {
    const at::DataPtr scratch = c10::GetCPUAllocator()->allocate(scratch_bytes);  // 64-byte aligned
    kernel.run(args, begin, end, static_cast<float*>(scratch.get()));
  });
}

at::Tensor attention(const at::Tensor& qkv, const at::Tensor& cu_seqlens, int64_t max_seqlen,
                     int64_t head_dim) {
  const int64_t num_heads = check::num_heads(kOp, qkv, head_dim);
  check::cu_seqlens_type(kOp, cu_seqlens);
  const int64_t tokens = qkv.size(0);
  const int64_t batch = cu_seqlens.size(0) - 1;
  const at::Tensor bounds = cu_seqlens.contiguous();
  const int32_t* bounds_data = bounds.const_data_ptr<int32_t>();
  const int64_t longest = check::seqlens(kOp, bounds_data, batch, tokens, max_seqlen);

  at::Tensor context = at::empty({tokens, num_heads * head_dim}, qkv.options());
  if (context.numel() == 0) return context;
  const at::Tensor rows = with_contiguous_rows(qkv);
  run_attention(kernels().attention, {rows.const_data_ptr<float>(), rows.stride(0), bounds_data, batch,
                                      num_heads, head_dim, longest, context.mutable_data_ptr<float>()});
  return context;
}

}  // namespace pruned_ops::cpu

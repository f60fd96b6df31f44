// The tasks of an attention: kQueryBlock query rows of one (sequence, head), in the order in which a thread
// runs those of its share.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernels.h"

namespace pruned_ops::CPU_CAPABILITY {

// Products of a score that are summed one after another. Each addition rounds at the size of the sum so far,
// and where scores are in the hundreds their absolute errors become relative ones of the weights: shorter
// chains err less, as those of the BLAS libraries do.
constexpr int64_t kChain = 16;

struct Sequence {
  int64_t first;   // its first token
  int64_t length;  // in tokens
};

// Tasks lie on an axis of cost, (sequence, head, query block), of `row_cost` for each query row; those whose
// start lies in [begin, end) run. Calls worker.lay_out(sequence, head) before the first task of a head, and
// worker.attend(sequence, head, query, rows) for each.
template <typename Worker>
void for_each_task(const AttentionArgs& args, int64_t begin, int64_t end, Worker& worker) {
  int64_t start = 0;
  for (int64_t i = 0; i < args.batch && start < end; ++i) {
    const Sequence sequence = {args.cu_seqlens[i], args.cu_seqlens[i + 1] - args.cu_seqlens[i]};
    const int64_t of_row = row_cost(args, sequence.length);
    const int64_t cost = sequence.length * of_row;
    for (int64_t head = 0; head < args.num_heads; ++head, start += cost) {
      if (start + cost <= begin || start >= end) continue;
      bool laid_out = false;
      for (int64_t query = 0; query < sequence.length; query += kQueryBlock) {
        const int64_t task = start + query * of_row;
        if (task < begin || task >= end) continue;
        if (!laid_out) worker.lay_out(sequence, head);
        laid_out = true;
        worker.attend(sequence, head, query, std::min(kQueryBlock, sequence.length - query));
      }
    }
  }
}

}  // namespace pruned_ops::CPU_CAPABILITY

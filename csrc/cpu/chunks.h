#pragma once

#include <cstdint>
#include <functional>

#include "cpu/kernels.h"

namespace pruned_ops::cpu {

// Floats from one row to the next of a scratch matrix: whole vectors, and an odd number of cache lines, so
// that the rows of a block lie in different sets of the cache.
inline int64_t scratch_stride(int64_t columns) {
  return ((columns + 15) / 16 | 1) * 16;
}

// Calls run(begin, end, scratch) for the rows of a batch: even shares for the threads, each in chunks of at
// most kChunkRows. scratch: this thread's scratch_floats floats, aligned to 64 bytes.
void for_each_chunk(int64_t rows, int64_t scratch_floats,
                    const std::function<void(int64_t begin, int64_t end, float* scratch)>& run);

}  // namespace pruned_ops::cpu

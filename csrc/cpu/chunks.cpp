#include "cpu/chunks.h"

#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>

namespace pruned_ops::cpu {

namespace {

// Fewer rows than this for each thread read the weights too often for what they compute.
constexpr int64_t kLeastRows = 8;

}  // namespace

void for_each_chunk(int64_t rows, int64_t scratch_floats,
                    const std::function<void(int64_t begin, int64_t end, float* scratch)>& run) {
  if (rows == 0) return;
  const int64_t shares = std::clamp<int64_t>(rows / kLeastRows, 1, at::get_num_threads());
  const int64_t stride = (scratch_floats + 15) / 16 * 16;
  const at::DataPtr scratch =
      c10::GetCPUAllocator()->allocate(static_cast<size_t>(shares * stride) * sizeof(float));
  float* first_scratch = static_cast<float*>(scratch.get());
  at::parallel_for(0, shares, 1, [&](int64_t from, int64_t to) {
    for (int64_t share = from; share < to; ++share) {
      const int64_t begin = rows * share / shares;
      const int64_t count = rows * (share + 1) / shares - begin;
      const int64_t chunks = (count + kChunkRows - 1) / kChunkRows;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        run(begin + count * chunk / chunks, begin + count * (chunk + 1) / chunks,
            first_scratch + share * stride);
      }
    }
  });
}

}  // namespace pruned_ops::cpu

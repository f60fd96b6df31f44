// Work that threads share: each has pieces of its own, and takes those of others that they have not begun
// when its own are done. Where all run alike nobody does. Where one is slower (another process has its core
// for a while, or it is a small core), the others do not wait for more than a piece of it.
#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <cstdint>
#include <vector>

namespace pruned_ops::cpu {

// Calls run(thread, share, piece) once for each of `pieces` of each of `shares`, which are as many as
// threads. thread: the number of the one that runs it, below `shares`; no two run at once that have the same.
template <typename Run>
void for_each_piece(int64_t shares, int64_t pieces, const Run& run) {
  std::vector<std::atomic<int64_t>> begun(static_cast<size_t>(shares));  // of each share
  at::parallel_for(0, shares, 1, [&](int64_t from, int64_t to) {
    for (int64_t thread = from; thread < to; ++thread) {
      for (int64_t other = 0; other < shares; ++other) {
        const int64_t share = (thread + other) % shares;
        std::atomic<int64_t>& next = begun[static_cast<size_t>(share)];
        // Looked at before it is counted up: of a share that is done all threads only read, and do not wait
        // for each other's writes.
        while (next.load(std::memory_order_relaxed) < pieces) {
          const int64_t piece = next.fetch_add(1, std::memory_order_relaxed);
          if (piece < pieces) run(thread, share, piece);
        }
      }
    }
  });
}

}  // namespace pruned_ops::cpu

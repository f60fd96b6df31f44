// The stacks on which a block's threads run, and how one gives way to another.
#pragma once

#include <cstddef>

namespace pruned_ops::cuda::emulator {

constexpr int kHost = -1;  // stands for the caller's own stack

// Fibers from 0 on, which begin at `life`, which never returns. Once in a process.
void make_fibers(int count, void (*life)());
// The next change to this fiber begins `life` anew; what was on its stack is forgotten.
void begin_anew(int fiber);
// Leaves the stack of `from`, which runs, for that of `to`; returns when somebody changes back.
void change(int from, int to);

// While it lives, an overflow of a fiber's stack calls `handle`, on a stack of its own.
class OverflowWatch {
 public:
  explicit OverflowWatch(void (*handle)());
  ~OverflowWatch();
  OverflowWatch(const OverflowWatch&) = delete;
};

}  // namespace pruned_ops::cuda::emulator

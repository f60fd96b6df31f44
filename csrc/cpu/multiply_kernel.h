// C[rows][vectors] (+)= A[rows][depth] * B[depth][vectors]: the one product that everything is made of.
// Owns up to kRegisterRows rows and two vectors of C, keeps them in registers over the whole depth,
// and writes them once. B is laid out so that the vectors of one depth step lie together.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>

namespace pruned_ops::CPU_CAPABILITY {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();

// Vectors of C side by side. Two per broadcast value of A: one would be bound by the broadcasts' loads.
constexpr int kPanelVectors = 2;
constexpr int64_t kPanel = kPanelVectors * kLanes;

// As many rows as leave registers for B and A: 12 * 2 + 2 + 1 of 32, 6 * 2 + 2 + 1 of 16, and 8 * 2 + 2 + 1
// of NEON's 32. Elsewhere a vector of eight floats takes two registers of 16: 2 * 4 + 4 + 1.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kRegisterRows = 12;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kRegisterRows = 6;
#elif defined(__aarch64__)
constexpr int kRegisterRows = 8;
#else
constexpr int kRegisterRows = 2;
#endif

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// What to bring into L2 while multiplying: `step` bytes from `from` on for every depth step. Weights that
// come from farther away than L2 are asked for one panel ahead, in even doses.
struct Ahead {
  const char* from;
  int64_t step;
};
struct NothingAhead {};

inline void fetch(const Ahead& ahead, int64_t step) {
  __builtin_prefetch(ahead.from + step * ahead.step, 0, 2);
}
inline void fetch(NothingAhead, int64_t) {}

// Where a product reads up to kRows rows of A: one pointer for three rows, since an address reaches one and
// two strides beyond a pointer. With a pointer for each row, gcc kept some of them in vector registers, and
// moving them back took 7% of the time of a product with 12 rows.
template <typename T, int kRows>
class RowPointers {
 public:
  RowPointers(const T* rows, int64_t stride) : stride_(stride) {
#pragma GCC unroll 8
    for (int i = 0; i < kPointers; ++i) {
      at_[i] = rows + kReach * i * stride;
      asm("" : "+r"(at_[i]));  // or it is made of the others again
    }
  }

  const T* operator[](int row) const { return at_[row / kReach] + row % kReach * stride_; }

  void advance(int64_t count) {
#pragma GCC unroll 8
    for (int i = 0; i < kPointers; ++i) at_[i] += count;
  }

 private:
  static constexpr int kReach = 3;
  static constexpr int kPointers = (kRows + kReach - 1) / kReach;
  int64_t stride_;
  const T* at_[kPointers];
};

// An unrolled loop keeps the accumulators in registers; a rolled one would index them in memory.
// What C held is added last: shorter chains of additions round less. b_stride: floats from one depth step to
// the next.
template <int kRows, int kVectors, typename Next>
void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, float* c,
              int64_t c_stride, bool accumulate, Next next) {
  Vec sums[kRows][kVectors];
#pragma GCC unroll 32
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
    for (int vector = 0; vector < kVectors; ++vector) {
      sums[row][vector] = Vec(0.0f);
    }
  }
  RowPointers<float, kRows> rows(a, a_stride);
#if defined(CPU_CAPABILITY_AVX2)
  // 6 cycles of products a step leave little to count steps in: 10% less time, and 20% at a depth of 16.
#pragma GCC unroll 4
#endif
  for (int64_t step = 0; step < depth; ++step) {
    Vec right[kVectors];
#pragma GCC unroll 2
    for (int vector = 0; vector < kVectors; ++vector) right[vector] = Vec::loadu(b + vector * kLanes);
    b += b_stride;
    fetch(next, step);
#pragma GCC unroll 32
    for (int row = 0; row < kRows; ++row) {
      const Vec left(*rows[row]);
#pragma GCC unroll 2
      for (int vector = 0; vector < kVectors; ++vector) {
        sums[row][vector] = at::vec::fmadd(left, right[vector], sums[row][vector]);
      }
    }
    rows.advance(1);
  }
#pragma GCC unroll 32
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
    for (int vector = 0; vector < kVectors; ++vector) {
      float* target = c + row * c_stride + vector * kLanes;
      (accumulate ? Vec::loadu(target) + sums[row][vector] : sums[row][vector]).store(target);
    }
  }
}

// Picks the instance for a number of rows known when it runs: 1 <= rows <= kRows.
template <int kVectors, typename Next = NothingAhead, int kRows = kRegisterRows>
void multiply_rows(int64_t rows, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                   int64_t depth, float* c, int64_t c_stride, bool accumulate, Next next = {}) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return multiply_rows<kVectors, Next, kRows - 1>(rows, a, a_stride, b, b_stride, depth, c, c_stride,
                                                      accumulate, next);
    }
  }
  multiply<kRows, kVectors>(a, a_stride, b, b_stride, depth, c, c_stride, accumulate, next);
}

// All columns: B lies as panels [depth][kPanel] of kPanel columns, panel_stride floats apart; the last panel
// is one vector wide if that is enough. columns is a multiple of kLanes.
inline void multiply_panels(int64_t rows, const float* a, int64_t a_stride, const float* b,
                            int64_t panel_stride, int64_t depth, float* c, int64_t c_stride, int64_t columns,
                            bool accumulate) {
  int64_t column = 0;
  for (; column + kPanel <= columns; column += kPanel, b += panel_stride) {
    multiply_rows<kPanelVectors>(rows, a, a_stride, b, kPanel, depth, c + column, c_stride, accumulate);
  }
  if (column < columns) {
    multiply_rows<1>(rows, a, a_stride, b, kLanes, depth, c + column, c_stride, accumulate);
  }
}

}  // namespace pruned_ops::CPU_CAPABILITY

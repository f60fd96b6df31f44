// C (+)= A B in bf16 by AVX512_BF16, in the manner of multiply_kernel.h: two products and their sum are added
// to an fp32 number in one instruction, which takes denormal numbers for 0. Two steps of depth lie together,
// as a pair, in A's rows and in B.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/multiply_kernel.h"

namespace pruned_ops::CPU_CAPABILITY {

constexpr int64_t kPair = 2;  // numbers of a lane

// c (kRows, 16 * kVectors) (+)= a b: b lies as [step][16 * kVectors] pairs, a's rows as pairs.
template <int kRows, int kVectors, typename Next>
void multiply_pairs(const uint16_t* a, int64_t a_stride, const uint16_t* b, int64_t steps, float* c,
                    int64_t c_stride, bool accumulate, Next next) {
  __m512 sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
    for (int vector = 0; vector < kVectors; ++vector) sums[row][vector] = _mm512_setzero_ps();
  }
  RowPointers<uint16_t, kRows> rows(a, a_stride);
  for (int64_t step = 0; step < steps; ++step) {
    __m512i right[kVectors];
#pragma GCC unroll 2
    for (int vector = 0; vector < kVectors; ++vector) right[vector] = _mm512_loadu_si512(b + vector * 32);
    b += kVectors * 32;
    fetch(next, step);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      int32_t pair;
      std::memcpy(&pair, rows[row], sizeof(pair));
      const __m512bh left = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 2
      for (int vector = 0; vector < kVectors; ++vector) {
        sums[row][vector] =
            _mm512_dpbf16_ps(sums[row][vector], left, reinterpret_cast<__m512bh>(right[vector]));
      }
    }
    rows.advance(kPair);
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
    for (int vector = 0; vector < kVectors; ++vector) {
      float* const target = c + row * c_stride + vector * kLanes;
      const __m512 sum = sums[row][vector];
      _mm512_storeu_ps(target, accumulate ? _mm512_add_ps(_mm512_loadu_ps(target), sum) : sum);
    }
  }
}

// Picks the instance for a number of rows known when it runs: 1 <= rows <= kRows.
template <int kVectors, typename Next = NothingAhead, int kRows = kRegisterRows>
void multiply_pair_rows(int64_t rows, const uint16_t* a, int64_t a_stride, const uint16_t* b, int64_t steps,
                        float* c, int64_t c_stride, bool accumulate, Next next = {}) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return multiply_pair_rows<kVectors, Next, kRows - 1>(rows, a, a_stride, b, steps, c, c_stride,
                                                           accumulate, next);
    }
  }
  multiply_pairs<kRows, kVectors>(a, a_stride, b, steps, c, c_stride, accumulate, next);
}

}  // namespace pruned_ops::CPU_CAPABILITY

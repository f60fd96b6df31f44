// int8 by SDOT, which multiplies four bytes of a row, a lane of a register, by the four of each of four
// channels and adds the products to their sums. That is a group of the panel: a part owns the sums of up to
// eight rows and eight channels, keeps them in registers over the whole depth, and writes them once.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "cpu/int8_neon_kernel.h"
#include "cpu/kernels.h"
#include "cpu/multiply_kernel.h"

namespace pruned_ops::CPU_CAPABILITY {

// Adds one depth step, whose bytes of x are lane kLane of `left`.
template <int kLane, int kRows>
[[gnu::always_inline]] inline void add_step(const int8_t* panel, const int8x16_t (&left)[kRows],
                                            int32x4_t (&tile)[kRows][kPartVectors]) {
#pragma GCC unroll 4
  for (int vector = 0; vector < kPartVectors; ++vector) {
    const int8x16_t weights = vld1q_s8(panel + vector * 16);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      tile[row][vector] = vdotq_laneq_s32(tile[row][vector], weights, left[row], kLane);
    }
  }
}

// sums (kRows, 8) = x times eight channels, whose first step lies at `panel`.
template <int kRows, typename Next>
void multiply_int8_part(const uint8_t* x, int64_t x_stride, const int8_t* panel, int64_t steps, Next next,
                        int32_t* sums) {
  int32x4_t tile[kRows][kPartVectors];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int vector = 0; vector < kPartVectors; ++vector) tile[row][vector] = vdupq_n_s32(0);
  }
  RowPointers<uint8_t, kRows> rows(x, x_stride);
  int8x16_t left[kRows];
  int64_t step = 0;
  for (; step + 4 <= steps; step += 4, panel += 4 * kStepBytes, rows.advance(4 * kInt8Group)) {
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) left[row] = vreinterpretq_s8_u8(vld1q_u8(rows[row]));
#pragma GCC unroll 4
    for (int ahead = 0; ahead < 4; ++ahead) fetch(next, step + ahead);
    add_step<0>(panel, left, tile);
    add_step<1>(panel + kStepBytes, left, tile);
    add_step<2>(panel + 2 * kStepBytes, left, tile);
    add_step<3>(panel + 3 * kStepBytes, left, tile);
  }
  for (; step < steps; ++step, panel += kStepBytes, rows.advance(kInt8Group)) {
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      left[row] = vreinterpretq_s8_s32(vld1q_dup_s32(reinterpret_cast<const int32_t*>(rows[row])));
    }
    add_step<0>(panel, left, tile);
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int vector = 0; vector < kPartVectors; ++vector) {
      vst1q_s32(sums + row * kWeightPanel + vector * kLanes, tile[row][vector]);
    }
  }
}

}  // namespace pruned_ops::CPU_CAPABILITY

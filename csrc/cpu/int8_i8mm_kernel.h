// int8 by SMMLA, which multiplies eight bytes of each of two rows by eight of each of two channels: twice
// SDOT's products in an instruction. A channel's eight bytes lie in two steps of the panel, which are
// interleaved when they are loaded, and then serve all pairs of rows. A part owns the sums of up to eight
// rows and eight channels, keeps them in registers over the whole depth, and writes them once.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "cpu/int8_neon_kernel.h"
#include "cpu/kernels.h"
#include "cpu/multiply_kernel.h"

namespace pruned_ops::CPU_CAPABILITY {

// Adds two depth steps; of kSteps = 1, one, and the bytes of x behind it are multiplied by 0.
template <int kSteps, int kPairs>
[[gnu::always_inline]] inline void add_steps(const int8_t* panel, const int8x16_t (&left)[kPairs],
                                             int32x4_t (&tile)[kPairs][2 * kPartVectors]) {
#pragma GCC unroll 4
  for (int vector = 0; vector < kPartVectors; ++vector) {
    const auto four_channels = [&](int64_t step) {
      return vreinterpretq_s32_s8(vld1q_s8(panel + step * kStepBytes + vector * 16));
    };
    const int32x4_t first = four_channels(0);
    const int32x4_t second = kSteps == 2 ? four_channels(1) : vdupq_n_s32(0);
    const int8x16_t even = vreinterpretq_s8_s32(vzip1q_s32(first, second));
    const int8x16_t odd = vreinterpretq_s8_s32(vzip2q_s32(first, second));
#pragma GCC unroll 8
    for (int pair = 0; pair < kPairs; ++pair) {
      tile[pair][2 * vector] = vmmlaq_s32(tile[pair][2 * vector], left[pair], even);
      tile[pair][2 * vector + 1] = vmmlaq_s32(tile[pair][2 * vector + 1], left[pair], odd);
    }
  }
}

// sums (kRows, 8) = x times eight channels, whose first step lies at `panel`. The last of an odd number of
// rows is a pair with itself.
template <int kRows, typename Next>
void multiply_int8_part(const uint8_t* x, int64_t x_stride, const int8_t* panel, int64_t steps, Next next,
                        int32_t* sums) {
  constexpr int kPairs = (kRows + 1) / 2;
  int32x4_t tile[kPairs][2 * kPartVectors];
#pragma GCC unroll 8
  for (int pair = 0; pair < kPairs; ++pair) {
#pragma GCC unroll 8
    for (int vector = 0; vector < 2 * kPartVectors; ++vector) tile[pair][vector] = vdupq_n_s32(0);
  }
  RowPointers<uint8_t, kRows> rows(x, x_stride);
  int8x16_t left[kPairs];
  const auto load_rows = [&] {
#pragma GCC unroll 8
    for (int pair = 0; pair < kPairs; ++pair) {
      const uint8x8_t second = vld1_u8(rows[2 * pair + 1 < kRows ? 2 * pair + 1 : 2 * pair]);
      left[pair] = vreinterpretq_s8_u8(vcombine_u8(vld1_u8(rows[2 * pair]), second));
    }
  };
  int64_t step = 0;
  for (; step + 2 <= steps; step += 2, panel += 2 * kStepBytes, rows.advance(2 * kInt8Group)) {
    load_rows();
    fetch(next, step);
    fetch(next, step + 1);
    add_steps<2>(panel, left, tile);
  }
  if (step < steps) {
    load_rows();
    add_steps<1>(panel, left, tile);
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int vector = 0; vector < kPartVectors; ++vector) {
      const int32x4_t even = tile[row / 2][2 * vector], odd = tile[row / 2][2 * vector + 1];
      vst1q_s32(sums + row * kWeightPanel + vector * kLanes,
                row % 2 == 0 ? vcombine_s32(vget_low_s32(even), vget_low_s32(odd))
                             : vcombine_s32(vget_high_s32(even), vget_high_s32(odd)));
    }
  }
}

}  // namespace pruned_ops::CPU_CAPABILITY

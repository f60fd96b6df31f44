// int8 by NEON: how rows of floats become int8, and a tile becomes parts, each of which the kernel of SDOT or
// of SMMLA multiplies. Both multiply signed bytes by signed ones: nothing is added to the activations, and
// the panel's start values are passed over.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <arm_neon.h>

#include <algorithm>
#include <bit>
#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/multiply_kernel.h"

namespace pruned_ops::CPU_CAPABILITY {

// Of a tile, whose parts are multiplied one after the other. Their 16 vectors of sums leave registers to the
// rows and the weights; with six rows and four vectors gcc moved some of the 24 sums to memory and back.
constexpr int kNarrowRows = 8;
constexpr int kPartVectors = 2;         // of four channels each
constexpr int64_t kQuantizedBytes = 1;  // of a value of x
constexpr int64_t kTailBytes = 0;       // after a row

// The largest magnitude of a row. Of two, the bits of the larger are the larger integer; those of what is not
// a number are the largest of all.
inline float top_of(const float* x, int64_t in) {
  const int32x4_t magnitude = vdupq_n_s32(0x7fffffff);
  int32x4_t top = vdupq_n_s32(0);
  for (int64_t i = 0; i < in; i += kLanes) {
    const float32x4_t values = Vec::loadu(x + i, std::min(in - i, kLanes));
    top = vmaxq_s32(top, vandq_s32(vreinterpretq_s32_f32(values), magnitude));
  }
  return std::bit_cast<float>(vmaxvq_s32(top));
}

// Eight floats times `inverse`, rounded to the nearest, of two to the even one; those from `count` on are 0,
// and so is what is not a number.
inline int16x8_t rounded(const float* x, int64_t count, float inverse) {
  const auto four = [&](int64_t at) {
    const int64_t left = std::clamp<int64_t>(count - at, 0, kLanes);
    return vcvtnq_s32_f32(vmulq_n_f32(Vec::loadu(x + at, left), inverse));
  };
  return vqmovn_high_s32(vqmovn_s32(four(0)), four(kLanes));
}

// Quantises a row whose largest magnitude is `top`; returns its scale. Groups of 16 values are written at
// once. Where `top` is no finite number the scale says so, and all values become 0, times an inverse of 0.
inline float quantize_row(const float* x, int64_t in, float top, uint8_t* bytes) {
  const float inverse = quantizing_factor(top);
  constexpr int64_t kStored = 16;
  static_assert(kStored <= kStoredValues);
  for (int64_t i = 0; i < in; i += kStored) {
    const int8x8_t first = vqmovn_s16(rounded(x + i, in - i, inverse));
    const int8x16_t both =
        vqmovn_high_s16(first, rounded(x + i + kStored / 2, in - i - kStored / 2, inverse));
    vst1q_u8(bytes + i, vreinterpretq_u8_s8(both));
  }
  return top / 127.0f;
}

constexpr int64_t kPartChannels = kPartVectors * kLanes;

// sums (kRows, 8) = x times eight channels, whose first step lies at `panel`.
template <int kRows, typename Next>
void multiply_int8_part(const uint8_t* x, int64_t x_stride, const int8_t* panel, int64_t steps, Next next,
                        int32_t* sums);

// sums (kRows, 32) = x times the panel, for its first `columns` channels, by parts. Only the first part
// brings the next panel nearer.
template <int kRows>
void multiply_int8(const uint8_t* x, int64_t x_stride, const int8_t* panel, int64_t steps, int64_t columns,
                   Ahead ahead, int32_t* sums) {
  const int8_t* const first = panel + kStepBytes;
  multiply_int8_part<kRows>(x, x_stride, first, steps, ahead, sums);
  for (int64_t column = kPartChannels; column < columns; column += kPartChannels) {
    multiply_int8_part<kRows>(x, x_stride, first + column * kInt8Group, steps, NothingAhead{}, sums + column);
  }
}

// The sums of kLanes channels, as floats.
inline Vec as_floats(const int32_t* sums) {
  return Vec(vcvtq_f32_s32(vld1q_s32(sums)));
}

}  // namespace pruned_ops::CPU_CAPABILITY

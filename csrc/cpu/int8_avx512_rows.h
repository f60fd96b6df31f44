// How rows of floats become int8 by AVX-512, for the kernels of VNNI and of AMX.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>

#include "cpu/kernels.h"
#include "cpu/multiply_kernel.h"

namespace pruned_ops::CPU_CAPABILITY {

// The largest magnitude of a row. Of two, the bits of the larger are the larger integer; those of what is not
// a number are the largest of all.
inline float top_of(const float* x, int64_t in) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i top = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + kLanes <= in; i += kLanes) {
    top = _mm512_max_epi32(top, _mm512_and_si512(_mm512_loadu_si512(x + i), magnitude));
  }
  if (i < in) {
    const auto mask = static_cast<__mmask16>((1u << (in - i)) - 1u);
    top = _mm512_max_epi32(top, _mm512_and_si512(_mm512_maskz_loadu_epi32(mask, x + i), magnitude));
  }
  return std::bit_cast<float>(_mm512_reduce_max_epi32(top));
}

// Rounds 16 floats times `inverse`; those from `count` on are 0.
inline __m512i rounded(const float* x, int64_t count, __m512 inverse) {
  const auto mask = static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, kLanes)) - 1u);
  return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x), inverse));
}

// Quantises a row whose largest magnitude is `top`; returns its scale. kAdded, 0 or 128, is added to the
// values. Whole cache lines are written. Where `top` is no finite number the scale says so, and all values
// become 0.
template <int kAdded>
inline float quantize_row_adding(const float* x, int64_t in, float top, uint8_t* bytes) {
  const bool finite = top <= std::numeric_limits<float>::max();
  const __m512 inverse = _mm512_set1_ps(quantizing_factor(top));
  // Packing takes quarters of vectors in turn.
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  const __m512i middle = _mm512_set1_epi8(static_cast<char>(kAdded));
  constexpr int64_t kLine = 64;
  for (int64_t i = 0; i < in; i += kLine) {
    __m512i fours[4];
    if (i + kLine <= in) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        fours[k] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i + k * kLanes), inverse));
      }
    } else {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) fours[k] = rounded(x + i + k * kLanes, in - i - k * kLanes, inverse);
    }
    const __m512i packed =
        _mm512_packs_epi16(_mm512_packs_epi32(fours[0], fours[1]), _mm512_packs_epi32(fours[2], fours[3]));
    const __m512i line = _mm512_xor_si512(_mm512_permutexvar_epi32(order, packed), middle);
    _mm512_storeu_si512(bytes + i, finite ? line : middle);
  }
  return top == top ? top / 127.0f : std::numeric_limits<float>::quiet_NaN();
}

// The sums of kLanes channels, as floats.
inline Vec as_floats(const int32_t* sums) {
  return Vec(_mm512_cvtepi32_ps(_mm512_load_si512(sums)));
}

}  // namespace pruned_ops::CPU_CAPABILITY

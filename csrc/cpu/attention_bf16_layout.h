// How keys and values in bfloat16 come to lie as the products of attention read them: in pairs of 4 bytes, of
// two channels of a key, or of a channel of two keys.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/multiply_bf16_kernel.h"

namespace pruned_ops::CPU_CAPABILITY {

// 16 rows (those from `count` on are zero) of `pairs` pairs, 8 or 16 -> `made` rows of 16 pairs, which lie
// `width` pairs apart; those from `pairs` on are zero.
inline void transpose_pairs(const uint16_t* source, int64_t source_stride, int64_t count, int64_t pairs,
                            uint16_t* to, int64_t width, int64_t made) {
  __m512i rows[16];
  const auto mask = static_cast<__mmask16>((1u << pairs) - 1u);
#pragma GCC unroll 16
  for (int64_t row = 0; row < 16; ++row) {
    rows[row] =
        row < count ? _mm512_maskz_loadu_epi32(mask, source + row * source_stride) : _mm512_setzero_si512();
  }
  __m512i fours[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    const __m512i low01 = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    const __m512i high01 = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    const __m512i low23 = _mm512_unpacklo_epi32(rows[i + 2], rows[i + 3]);
    const __m512i high23 = _mm512_unpackhi_epi32(rows[i + 2], rows[i + 3]);
    fours[i] = _mm512_unpacklo_epi64(low01, low23);
    fours[i + 1] = _mm512_unpackhi_epi64(low01, low23);
    fours[i + 2] = _mm512_unpacklo_epi64(high01, high23);
    fours[i + 3] = _mm512_unpackhi_epi64(high01, high23);
  }
  // fours[4 i + j] holds pairs j, j + 4, j + 8, j + 12 of rows 4 i to 4 i + 3, a quarter each.
#pragma GCC unroll 16
  for (int j = 0; j < 4; ++j) {
    const __m512i even01 = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0x88);
    const __m512i odd01 = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0xdd);
    const __m512i even23 = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0xdd);
    const __m512i columns[4] = {
        _mm512_shuffle_i32x4(even01, even23, 0x88), _mm512_shuffle_i32x4(odd01, odd23, 0x88),
        _mm512_shuffle_i32x4(even01, even23, 0xdd), _mm512_shuffle_i32x4(odd01, odd23, 0xdd)};
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      if (4 * k + j < made) _mm512_storeu_si512(to + (4 * k + j) * width * kPair, columns[k]);
    }
  }
}

// 16 channels of two keys, the second's zero where it is null -> 16 pairs.
inline void pair_channels(const uint16_t* first, const uint16_t* second, uint16_t* to) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                         22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const auto channels = [](const uint16_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  };
  const __m256i odd = second != nullptr ? channels(second) : _mm256_setzero_si256();
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(channels(first)), odd, 1);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, both));
}

}  // namespace pruned_ops::CPU_CAPABILITY

// int8 by AVX2. Its instruction multiplies unsigned bytes by signed ones and adds two products in 16 bits,
// which 2 * 255 * 127 does not fit into, but 2 * 127 * 127 does. So a value's magnitude is multiplied by a
// weight that has taken on the value's sign, and pairs are added in 32 bits at once: the sums are exact.
// Nothing is added to the activations: the panel's start values are passed over.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/multiply_kernel.h"

namespace pruned_ops::CPU_CAPABILITY {

// Rows of a tile: 5 * 2 sums, two vectors of weights, the ones, a row's values and magnitudes, and a product
// take all 16 registers. (6 rows are 9% slower, 4 read the weights more often.)
constexpr int kNarrowRows = 5;
// Of a value of x. A group is its four values, then their four magnitudes.
constexpr int64_t kQuantizedBytes = 2;

// Eight floats times `inverse`, rounded, as two groups; what is not a number becomes 0.
inline __m128i rounded_groups(const Vec& x, __m256 inverse) {
  const __m256 scaled = _mm256_mul_ps(x, inverse);
  const __m256 numbers = _mm256_and_ps(scaled, _mm256_cmp_ps(scaled, scaled, _CMP_ORD_Q));
  const __m256i rounded = _mm256_cvtps_epi32(numbers);
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  const __m128i bytes = _mm_packs_epi16(words, words);
  return _mm_unpacklo_epi32(bytes, _mm_abs_epi8(bytes));
}

// The largest magnitude of a row; not a number where one of its values is none.
inline float top_of(const float* x, int64_t in) {
  const auto maximum = [](Vec& a, Vec& b) { return at::vec::maximum(a, b); };
  Vec largest(0.0f);
  for (int64_t i = 0; i < in; i += kLanes) {
    largest = at::vec::maximum(largest, Vec::loadu(x + i, std::min(in - i, kLanes)).abs());
  }
  return at::vec::vec_reduce_all<float>(maximum, largest);
}

// Quantises a row whose largest magnitude is `top`; returns its scale.
inline float quantize_row(const float* x, int64_t in, float top, uint8_t* bytes) {
  const __m256 inverse = _mm256_set1_ps(top > 0.0f ? 127.0f / top : 0.0f);
  for (int64_t i = 0; i < in; i += kLanes) {
    const Vec values = Vec::loadu(x + i, std::min(in - i, kLanes));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + i * kQuantizedBytes),
                     rounded_groups(values, inverse));
  }
  return top / 127.0f;
}

// Four bytes, in all lanes.
inline __m256i four_at(const uint8_t* bytes) {
  int32_t four;
  std::memcpy(&four, bytes, sizeof(four));
  return _mm256_set1_epi32(four);
}

// sums (kRows, 16) = x times half of the panel: 16 of its 32 channels, from `half` on.
template <int kRows, typename Next>
void multiply_int8_half(const uint8_t* x, int64_t x_stride, const int8_t* half, int64_t steps, Next next,
                        int32_t* sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i tile[kRows][2];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) tile[row][0] = tile[row][1] = _mm256_setzero_si256();
  for (int64_t step = 0; step < steps; ++step) {
    half += kStepBytes;
    const __m256i weights[2] = {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(half)),
                                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(half + 32))};
    fetch(next, step);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const uint8_t* group = x + row * x_stride + step * kInt8Group * kQuantizedBytes;
      const __m256i values = four_at(group);
      const __m256i magnitudes = four_at(group + kInt8Group);
#pragma GCC unroll 2
      for (int vector = 0; vector < 2; ++vector) {
        const __m256i signed_weights = _mm256_sign_epi8(weights[vector], values);
        const __m256i pairs = _mm256_maddubs_epi16(magnitudes, signed_weights);
        tile[row][vector] = _mm256_add_epi32(tile[row][vector], _mm256_madd_epi16(pairs, ones));
      }
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
    __m256i* to = reinterpret_cast<__m256i*>(sums + row * kWeightPanel);
    _mm256_storeu_si256(to, tile[row][0]);
    _mm256_storeu_si256(to + 1, tile[row][1]);
  }
}

// sums (kRows, 32) = x times the panel, for its first `columns` channels. Only the first half brings the next
// panel nearer.
template <int kRows>
void multiply_int8(const uint8_t* x, int64_t x_stride, const int8_t* panel, int64_t steps, int64_t columns,
                   Ahead ahead, int32_t* sums) {
  constexpr int64_t kHalf = kWeightPanel / 2;
  multiply_int8_half<kRows>(x, x_stride, panel, steps, ahead, sums);
  if (columns > kHalf) {
    multiply_int8_half<kRows>(x, x_stride, panel + kHalf * kInt8Group, steps, NothingAhead{}, sums + kHalf);
  }
}

// The sums of kLanes channels, as floats.
inline Vec as_floats(const int32_t* sums) {
  return Vec(_mm256_cvtepi32_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(sums))));
}

}  // namespace pruned_ops::CPU_CAPABILITY

// int8 by AVX2. Its instruction multiplies unsigned bytes by signed ones and adds two products in 16 bits,
// which 2 * 255 * 127 does not fit into, but 2 * 127 * 128 does. So a value's magnitude is multiplied by a
// weight whose bits are turned over where the value is negative, and pairs are added in 32 bits at once. The
// bits turned over are -weight - 1, so that each negative value lacks its magnitude: a row ends with the sum
// of those, and the sums start there, so that they are exact. (Giving the weight the value's sign is one
// instruction, too, but one that waits for the two ports that multiply.)
// Nothing is added to the activations: the panel's start values are passed over.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/kernels.h"
#include "cpu/multiply_kernel.h"

namespace pruned_ops::CPU_CAPABILITY {

constexpr int kNarrowRows = 6;  // of a tile, in two parts that are multiplied one after the other
// Of these: 3 * 4 sums, the ones, a row's turns and magnitudes, and a product take all 16 registers. Against
// parts of 5 rows and half a panel, they read less: 15% more products a second.
constexpr int kRegisterTile = 3;
// Of a value of x. A group is four bytes that are all ones where a value is negative, then four magnitudes.
constexpr int64_t kQuantizedBytes = 2;
constexpr int64_t kTailBytes = sizeof(int32_t);  // the sum of a row's negative values' magnitudes

// The largest magnitude of a row. Of two, the bits of the larger are the larger integer; those of what is not
// a number are the largest of all.
inline float top_of(const float* x, int64_t in) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i top = _mm256_setzero_si256();
  for (int64_t i = 0; i < in; i += kLanes) {
    const __m256 values = Vec::loadu(x + i, std::min(in - i, kLanes));
    top = _mm256_max_epi32(top, _mm256_and_si256(_mm256_castps_si256(values), magnitude));
  }
  alignas(32) int32_t lanes[kLanes];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), top);
  return std::bit_cast<float>(*std::max_element(lanes, lanes + kLanes));
}

// Where the sum of a row's negative values' magnitudes lies.
inline int64_t tail_of(int64_t steps) {
  return steps * kInt8Group * kQuantizedBytes;
}

// Eight floats times `inverse`, rounded; those from `count` on are 0.
inline __m256i rounded(const float* x, int64_t count, __m256 inverse) {
  const Vec values = count >= kLanes ? Vec::loadu(x) : Vec::loadu(x, std::max<int64_t>(count, 0));
  return _mm256_cvtps_epi32(_mm256_mul_ps(values, inverse));
}

// Quantises a row whose largest magnitude is `top`; returns its scale. Groups of 32 values are written at
// once. Where `top` is no finite number the scale says so, and all values become 0.
inline float quantize_row(const float* x, int64_t in, float top, uint8_t* bytes) {
  const __m256 inverse = _mm256_set1_ps(quantizing_factor(top));
  const bool is_finite = top <= std::numeric_limits<float>::max();
  const __m256i kept = _mm256_set1_epi32(is_finite ? -1 : 0);
  const __m256i zero = _mm256_setzero_si256();
  // Packing leaves group 0, 2, 4, 6, then 1, 3, 5, 7; below, halves of lanes are taken in turn.
  const __m256i order = _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7);
  __m256i missing = zero;
  for (int64_t i = 0; i < in; i += kStoredValues) {
    const auto eight = [&](int64_t at) { return rounded(x + i + at, in - i - at, inverse); };
    const __m256i words[2] = {_mm256_packs_epi32(eight(0), eight(kLanes)),
                              _mm256_packs_epi32(eight(2 * kLanes), eight(3 * kLanes))};
    const __m256i packed = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words[0], words[1]), order);
    const __m256i values = _mm256_and_si256(packed, kept);
    const __m256i turns = _mm256_cmpgt_epi8(zero, values);
    const __m256i magnitudes = _mm256_abs_epi8(values);
    missing = _mm256_add_epi64(missing, _mm256_sad_epu8(_mm256_and_si256(magnitudes, turns), zero));
    __m256i* const to = reinterpret_cast<__m256i*>(bytes + i * kQuantizedBytes);
    _mm256_storeu_si256(to, _mm256_unpacklo_epi32(turns, magnitudes));
    _mm256_storeu_si256(to + 1, _mm256_unpackhi_epi32(turns, magnitudes));
  }
  alignas(32) int64_t sums[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(sums), missing);
  const auto sum = static_cast<int32_t>(sums[0] + sums[1] + sums[2] + sums[3]);
  std::memcpy(bytes + tail_of((in + kInt8Group - 1) / kInt8Group), &sum, sizeof(sum));
  return top / 127.0f;
}

// Four bytes, in all lanes.
inline __m256i four_at(const uint8_t* bytes) {
  int32_t four;
  std::memcpy(&four, bytes, sizeof(four));
  return _mm256_set1_epi32(four);
}

// sums (kRows, 8 * kVectors) = x times the panel's first channels.
template <int kRows, int kVectors, typename Next>
void multiply_int8_part(const uint8_t* x, int64_t x_stride, const int8_t* panel, int64_t steps, Next next,
                        int32_t* sums) {
  static_assert(kRows <= kRegisterTile);
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i tile[kRows][kVectors];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int vector = 0; vector < kVectors; ++vector) tile[row][vector] = _mm256_setzero_si256();
  }
  const uint8_t* group = x;
  for (int64_t step = 0; step < steps; ++step) {
    panel += kStepBytes;
    fetch(next, step);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const __m256i turns = four_at(group + row * x_stride);
      const __m256i magnitudes = four_at(group + row * x_stride + kInt8Group);
#pragma GCC unroll 4
      for (int vector = 0; vector < kVectors; ++vector) {
        const __m256i weights = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel) + vector);
        const __m256i pairs = _mm256_maddubs_epi16(magnitudes, _mm256_xor_si256(weights, turns));
        // An addition in place, and one product after the other: left to itself gcc begins several, and moves
        // sums to memory to make room.
        asm volatile("vpaddd %1, %0, %0" : "+x"(tile[row][vector]) : "x"(_mm256_madd_epi16(pairs, ones)));
      }
    }
    group += kInt8Group * kQuantizedBytes;
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
    const __m256i missing = four_at(x + row * x_stride + tail_of(steps));
#pragma GCC unroll 4
    for (int vector = 0; vector < kVectors; ++vector) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + row * kWeightPanel) + vector,
                          _mm256_add_epi32(tile[row][vector], missing));
    }
  }
}

// sums (kRows, 32) = x times the panel, for its first `columns` channels: half of them cost half. Only the
// first rows bring the next panel nearer.
template <int kRows, typename Next = Ahead>
void multiply_int8(const uint8_t* x, int64_t x_stride, const int8_t* panel, int64_t steps, int64_t columns,
                   Next next, int32_t* sums) {
  constexpr int kVectors = kWeightPanel / kLanes;
  if constexpr (kRows > kRegisterTile) {
    constexpr int kFirst = (kRows + 1) / 2;
    multiply_int8<kFirst, Next>(x, x_stride, panel, steps, columns, next, sums);
    multiply_int8<kRows - kFirst, NothingAhead>(x + kFirst * x_stride, x_stride, panel, steps, columns, {},
                                                sums + kFirst * kWeightPanel);
  } else if (columns <= kWeightPanel / 2) {
    multiply_int8_part<kRows, kVectors / 2>(x, x_stride, panel, steps, next, sums);
  } else {
    multiply_int8_part<kRows, kVectors>(x, x_stride, panel, steps, next, sums);
  }
}

// The sums of kLanes channels, as floats.
inline Vec as_floats(const int32_t* sums) {
  return Vec(_mm256_cvtepi32_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(sums))));
}

}  // namespace pruned_ops::CPU_CAPABILITY

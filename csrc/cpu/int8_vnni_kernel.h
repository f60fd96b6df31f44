// int8 by AVX-512 VNNI: four products of unsigned and signed bytes, and their sum, in one instruction. So 128
// is added to the activations, and the panel's start values make up for it.
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

constexpr int kInt8Rows = kRegisterRows;  // of a tile
constexpr int64_t kQuantizedBytes = 1;    // of a value of x, with 128 added

inline void quantize_rows(const float* x, int64_t x_stride, int64_t rows, int64_t in, uint8_t* bytes,
                          int64_t bytes_stride, float* scales) {
  const auto maximum = [](Vec& a, Vec& b) { return at::vec::maximum(a, b); };
  const __m512i middle = _mm512_set1_epi32(128);
  for (int64_t row = 0; row < rows; ++row, x += x_stride, bytes += bytes_stride) {
    Vec largest(0.0f);
    for (int64_t i = 0; i < in; i += kLanes) {
      largest = at::vec::maximum(largest, Vec::loadu(x + i, std::min(in - i, kLanes)).abs());
    }
    const float top = at::vec::vec_reduce_all<float>(maximum, largest);
    scales[row] = top / 127.0f;
    const __m512 inverse = _mm512_set1_ps(top > 0.0f ? 127.0f / top : 0.0f);
    const int64_t padded = (in + kInt8Group - 1) / kInt8Group * kInt8Group;
    for (int64_t i = 0; i < in; i += kLanes) {
      const __m512 values = Vec::loadu(x + i, std::min(in - i, kLanes));
      const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(values, inverse));
      const __m128i narrow = _mm512_cvtepi32_epi8(_mm512_add_epi32(rounded, middle));
      const auto mask = static_cast<__mmask16>((1u << std::min(padded - i, kLanes)) - 1u);
      _mm_mask_storeu_epi8(bytes + i, mask, narrow);
    }
  }
}

// sums (kRows, 32) = the panel's start values, plus x times the panel. All 32 channels cost what one does.
template <int kRows>
void multiply_int8(const uint8_t* x, int64_t x_stride, const int8_t* panel, int64_t steps, int64_t,
                   Ahead ahead, int32_t* sums) {
  __m512i tile[kRows][2];
  const __m512i start[2] = {_mm512_loadu_si512(panel), _mm512_loadu_si512(panel + 64)};
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
    tile[row][0] = start[0];
    tile[row][1] = start[1];
  }
  for (int64_t step = 0; step < steps; ++step) {
    panel += kStepBytes;
    const __m512i left = _mm512_loadu_si512(panel);
    const __m512i right = _mm512_loadu_si512(panel + 64);
    fetch(ahead, step);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      int32_t group;
      std::memcpy(&group, x + row * x_stride + step * kInt8Group, sizeof(group));
      const __m512i four = _mm512_set1_epi32(group);
      tile[row][0] = _mm512_dpbusd_epi32(tile[row][0], four, left);
      tile[row][1] = _mm512_dpbusd_epi32(tile[row][1], four, right);
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
    _mm512_storeu_si512(sums + row * kWeightPanel, tile[row][0]);
    _mm512_storeu_si512(sums + row * kWeightPanel + kLanes, tile[row][1]);
  }
}

// The sums of kLanes channels, as floats.
inline Vec as_floats(const int32_t* sums) {
  return Vec(_mm512_cvtepi32_ps(_mm512_load_si512(sums)));
}

}  // namespace pruned_ops::CPU_CAPABILITY

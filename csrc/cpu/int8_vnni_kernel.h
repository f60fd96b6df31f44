// int8 by AVX-512 VNNI: four products of unsigned and signed bytes, and their sum, in one instruction. So 128
// is added to the activations, and the panel's start values make up for it.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/int8_avx512_rows.h"
#include "cpu/kernels.h"
#include "cpu/multiply_kernel.h"

namespace pruned_ops::CPU_CAPABILITY {

constexpr int kNarrowRows = kRegisterRows;  // of a tile
constexpr int64_t kQuantizedBytes = 1;      // of a value of x, with 128 added
constexpr int64_t kTailBytes = 0;           // after a row

inline float quantize_row(const float* x, int64_t in, float top, uint8_t* bytes) {
  return quantize_row_adding<128>(x, in, top, bytes);
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
  RowPointers<uint8_t, kRows> rows(x, x_stride);
  for (int64_t step = 0; step < steps; ++step) {
    panel += kStepBytes;
    const __m512i left = _mm512_loadu_si512(panel);
    const __m512i right = _mm512_loadu_si512(panel + 64);
    fetch(ahead, step);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      int32_t group;
      std::memcpy(&group, rows[row], sizeof(group));
      const __m512i four = _mm512_set1_epi32(group);
      tile[row][0] = _mm512_dpbusd_epi32(tile[row][0], four, left);
      tile[row][1] = _mm512_dpbusd_epi32(tile[row][1], four, right);
    }
    rows.advance(kInt8Group);
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
    _mm512_storeu_si512(sums + row * kWeightPanel, tile[row][0]);
    _mm512_storeu_si512(sums + row * kWeightPanel + kLanes, tile[row][1]);
  }
}

}  // namespace pruned_ops::CPU_CAPABILITY

// x weight^T in int8 by VNNI, in the manner of linear_kernel.h: a call owns some rows, keeps a tile of int32
// sums in registers, brings them back to float, finishes and writes them once.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/multiply_kernel.h"
#include "cpu/tile_kernel.h"

namespace pruned_ops::CPU_CAPABILITY {

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

// sums (kRows, 32) = the panel's start values, plus x times the panel.
template <int kRows>
void multiply_int8(const uint8_t* x, int64_t x_stride, const int8_t* panel, int64_t steps, Ahead ahead,
                   int32_t* sums) {
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

// Picks the instance for a number of rows known when it runs: 1 <= rows <= kRows.
template <int kRows = kRegisterRows>
void multiply_int8_rows(int64_t rows, const uint8_t* x, int64_t x_stride, const int8_t* panel, int64_t steps,
                        Ahead ahead, int32_t* sums) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return multiply_int8_rows<kRows - 1>(rows, x, x_stride, panel, steps, ahead, sums);
    }
  }
  multiply_int8<kRows>(x, x_stride, panel, steps, ahead, sums);
}

inline void int8_linear(const Int8LinearArgs& args, const uint8_t* x, int64_t x_stride, const float* x_scales,
                        int64_t rows, Finish finish, float* out, int64_t out_stride) {
  const int64_t steps = (args.in + kInt8Group - 1) / kInt8Group;
  const int64_t panel_bytes = (1 + steps) * kStepBytes;
  alignas(64) int32_t sums[kRegisterRows * kWeightPanel];
  for_each_tile(args.panels, panel_bytes, steps, args.out, rows, [&](const Tile& tile) {
    multiply_int8_rows(tile.rows, x + tile.first_row * x_stride, x_stride,
                       args.panels + tile.panel * panel_bytes, steps, tile.ahead, sums);
    finish_tile(tile, args.bias, finish, out, out_stride, [&](int64_t column, int64_t lanes) {
      const Vec scale = Vec::loadu(args.scales + tile.first_column + column, lanes);
      const int32_t* at = sums + column;
      const float* row_scales = x_scales + tile.first_row;
      return [scale, at, row_scales](int64_t row) {
        const Vec sum(_mm512_cvtepi32_ps(_mm512_load_si512(at + row * kWeightPanel)));
        return sum * (scale * Vec(row_scales[row]));
      };
    });
  });
}

}  // namespace pruned_ops::CPU_CAPABILITY

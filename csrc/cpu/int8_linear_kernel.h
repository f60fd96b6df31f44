// x weight^T in int8 by VNNI, in the manner of linear_kernel.h: a call owns some rows, passes for every panel
// of the weight over blocks of kInt8Rows rows, keeps a tile of int32 sums in registers, brings them back to
// float, finishes and writes them once.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/gelu_kernel.h"
#include "cpu/kernels.h"

namespace pruned_ops::CPU_CAPABILITY {

constexpr int kInt8Rows = 12;  // 12 * 2 sums, 2 of the weight and 1 of x, of 32 registers
constexpr int64_t kInt8Lanes = 16;

inline void quantize_rows(const float* x, int64_t x_stride, int64_t rows, int64_t in, uint8_t* bytes,
                          int64_t bytes_stride, float* scales) {
  using Vec = at::vec::Vectorized<float>;
  const auto maximum = [](Vec& a, Vec& b) { return at::vec::maximum(a, b); };
  const __m512i middle = _mm512_set1_epi32(128);
  for (int64_t row = 0; row < rows; ++row, x += x_stride, bytes += bytes_stride) {
    Vec largest(0.0f);
    for (int64_t i = 0; i < in; i += kInt8Lanes) {
      largest = at::vec::maximum(largest, Vec::loadu(x + i, std::min(in - i, kInt8Lanes)).abs());
    }
    const float top = at::vec::vec_reduce_all<float>(maximum, largest);
    scales[row] = top / 127.0f;
    const __m512 inverse = _mm512_set1_ps(top > 0.0f ? 127.0f / top : 0.0f);
    const int64_t padded = (in + kInt8Group - 1) / kInt8Group * kInt8Group;
    for (int64_t i = 0; i < in; i += kInt8Lanes) {
      const __m512 values = Vec::loadu(x + i, std::min(in - i, kInt8Lanes));
      const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(values, inverse));
      const __m128i narrow = _mm512_cvtepi32_epi8(_mm512_add_epi32(rounded, middle));
      const auto mask = static_cast<__mmask16>((1u << std::min(padded - i, kInt8Lanes)) - 1u);
      _mm_mask_storeu_epi8(bytes + i, mask, narrow);
    }
  }
}

// sums (kRows, 32) = what the panel starts with, and x times it.
template <int kRows>
void multiply_int8(const uint8_t* x, int64_t x_stride, const int8_t* panel, int64_t steps, const char* next,
                   int64_t dose, int32_t* sums) {
  __m512i tile[kRows][2];
  const __m512i start[2] = {_mm512_loadu_si512(panel), _mm512_loadu_si512(panel + 64)};
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
    tile[row][0] = start[0];
    tile[row][1] = start[1];
  }
  for (int64_t step = 0; step < steps; ++step) {
    panel += kInt8Step;
    const __m512i left = _mm512_loadu_si512(panel);
    const __m512i right = _mm512_loadu_si512(panel + 64);
    __builtin_prefetch(next + step * dose, 0, 2);
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
    _mm512_storeu_si512(sums + row * kWeightPanel + kInt8Lanes, tile[row][1]);
  }
}

// Picks the instance for a number of rows known when it runs: 1 <= rows <= kRows.
template <int kRows = kInt8Rows>
void multiply_int8_rows(int64_t rows, const uint8_t* x, int64_t x_stride, const int8_t* panel, int64_t steps,
                        const char* next, int64_t dose, int32_t* sums) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return multiply_int8_rows<kRows - 1>(rows, x, x_stride, panel, steps, next, dose, sums);
    }
  }
  multiply_int8<kRows>(x, x_stride, panel, steps, next, dose, sums);
}

inline void int8_linear(const Int8LinearArgs& args, const uint8_t* x, int64_t x_stride, const float* x_scales,
                        int64_t rows, Finish finish, float* out, int64_t out_stride) {
  using Vec = at::vec::Vectorized<float>;
  const int64_t blocks = (rows + kInt8Rows - 1) / kInt8Rows;
  const int64_t panels = (args.out + kWeightPanel - 1) / kWeightPanel;
  const int64_t steps = (args.in + kInt8Group - 1) / kInt8Group;
  const int64_t panel_bytes = (1 + steps) * kInt8Step;
  const int64_t dose = blocks > 0 ? kInt8Step / blocks + 1 : 0;
  alignas(64) int32_t sums[kInt8Rows * kWeightPanel];
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int8_t* weight = args.panels + panel * panel_bytes;
    const int8_t* next = panel + 1 < panels ? weight + panel_bytes : weight;
    const int64_t first = panel * kWeightPanel;
    const int64_t columns = std::min(args.out - first, kWeightPanel);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t begin = rows * block / blocks;
      const int64_t count = rows * (block + 1) / blocks - begin;
      multiply_int8_rows(count, x + begin * x_stride, x_stride, weight, steps,
                         reinterpret_cast<const char*>(next) + block * dose * steps, dose, sums);
      for (int64_t column = 0; column < columns; column += kInt8Lanes) {
        const int64_t lanes = std::min(columns - column, kInt8Lanes);
        const Vec scale = Vec::loadu(args.scales + first + column, lanes);
        const Vec bias =
            finish == Finish::kNothing ? Vec(0.0f) : Vec::loadu(args.bias + first + column, lanes);
        for (int64_t row = 0; row < count; ++row) {
          const Vec sum(_mm512_cvtepi32_ps(_mm512_load_si512(sums + row * kWeightPanel + column)));
          Vec value = at::vec::fmadd(sum, scale * Vec(x_scales[begin + row]), bias);
          if (finish == Finish::kBiasGelu) value = gelu(value);
          value.store(out + (begin + row) * out_stride + first + column, static_cast<int>(lanes));
        }
      }
    }
  }
}

}  // namespace pruned_ops::CPU_CAPABILITY

// x weight^T in bf16 by AVX512_BF16, in the manner of linear_kernel.h: two products and their sum are added
// to an fp32 number in one instruction. A call owns some rows, keeps a tile of fp32 sums in registers,
// finishes and writes them once. The instruction takes denormal numbers for 0.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/multiply_kernel.h"
#include "cpu/tile_kernel.h"

namespace pruned_ops::CPU_CAPABILITY {

inline void round_rows(const float* x, int64_t x_stride, int64_t rows, int64_t in, uint16_t* rounded,
                       int64_t rounded_stride) {
  const int64_t padded = round_up(in, kBf16Group);
  for (int64_t row = 0; row < rows; ++row, x += x_stride, rounded += rounded_stride) {
    for (int64_t i = 0; i < in; i += kLanes) {
      const Vec values = Vec::loadu(x + i, std::min(in - i, kLanes));
      const __m256bh narrow = _mm512_cvtneps_pbh(values);
      const auto mask = static_cast<__mmask16>((1u << std::min(padded - i, kLanes)) - 1u);
      _mm256_mask_storeu_epi16(rounded + i, mask, reinterpret_cast<const __m256i&>(narrow));
    }
  }
}

// 16 channels of a step of a panel.
inline __m512bh pairs_at(const uint16_t* panel) {
  const __m512i bits = _mm512_loadu_si512(panel);
  return reinterpret_cast<const __m512bh&>(bits);
}

// Two numbers, in all lanes.
inline __m512bh pair_at(const uint16_t* x) {
  int32_t pair;
  std::memcpy(&pair, x, sizeof(pair));
  const __m512i bits = _mm512_set1_epi32(pair);
  return reinterpret_cast<const __m512bh&>(bits);
}

// sums (kRows, 32) = x times the panel. All 32 channels cost what one does.
template <int kRows>
void multiply_bf16(const uint16_t* x, int64_t x_stride, const uint16_t* panel, int64_t steps, Ahead ahead,
                   float* sums) {
  constexpr int64_t kVector = kBf16Group * kLanes;
  __m512 tile[kRows][kPanelVectors];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) tile[row][0] = tile[row][1] = _mm512_setzero_ps();
  RowPointers<uint16_t, kRows> rows(x, x_stride);
  for (int64_t step = 0; step < steps; ++step) {
    const __m512bh left = pairs_at(panel);
    const __m512bh right = pairs_at(panel + kVector);
    panel += kPanelVectors * kVector;
    fetch(ahead, step);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const __m512bh pair = pair_at(rows[row]);
      tile[row][0] = _mm512_dpbf16_ps(tile[row][0], pair, left);
      tile[row][1] = _mm512_dpbf16_ps(tile[row][1], pair, right);
    }
    rows.advance(kBf16Group);
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
    _mm512_store_ps(sums + row * kWeightPanel, tile[row][0]);
    _mm512_store_ps(sums + row * kWeightPanel + kLanes, tile[row][1]);
  }
}

// Picks the instance for a number of rows known when it runs: 1 <= rows <= kRows.
template <int kRows = kRegisterRows>
void multiply_bf16_rows(int64_t rows, const uint16_t* x, int64_t x_stride, const uint16_t* panel,
                        int64_t steps, Ahead ahead, float* sums) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return multiply_bf16_rows<kRows - 1>(rows, x, x_stride, panel, steps, ahead, sums);
  }
  multiply_bf16<kRows>(x, x_stride, panel, steps, ahead, sums);
}

inline void bf16_linear(const Bf16LinearArgs& args, const uint16_t* x, int64_t x_stride, int64_t rows,
                        Finish finish, float* out, int64_t out_stride) {
  const int64_t steps = round_up(args.in, kBf16Group) / kBf16Group;
  const int64_t panel_numbers = steps * kBf16Group * kWeightPanel;
  alignas(64) float sums[kRegisterRows * kWeightPanel];
  for_each_tile(args.panels, steps * kStepBytes, steps, args.out, rows, [&](const Tile& tile) {
    multiply_bf16_rows(tile.rows, x + tile.first_row * x_stride, x_stride,
                       args.panels + tile.panel * panel_numbers, steps, tile.ahead, sums);
    finish_tile(tile, args.bias, finish, out, out_stride, [&](int64_t at, int64_t) {
      const float* from = sums + at;
      return [from](int64_t row) { return Vec::loadu(from + row * kWeightPanel); };
    });
  });
}

}  // namespace pruned_ops::CPU_CAPABILITY

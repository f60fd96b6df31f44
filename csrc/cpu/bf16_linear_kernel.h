// x weight^T in bf16 by AVX512_BF16 or AMX, in the manner of linear_kernel.h: two products and their sum are
// added to an fp32 number in one instruction. A call owns some rows, keeps a tile of fp32 sums in registers,
// finishes and writes them once. The instructions take denormal numbers for 0.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/multiply_bf16_kernel.h"
#include "cpu/multiply_kernel.h"
#include "cpu/tile_kernel.h"
#if defined(__AMX_BF16__)
#include "cpu/amx_tiles.h"
#endif

namespace pruned_ops::CPU_CAPABILITY {

// The first `lanes` of 16 numbers, rounded to bf16.
inline void store_rounded(const Vec& values, int64_t lanes, uint16_t* to) {
  const __m256bh narrow = _mm512_cvtneps_pbh(values);
  const auto& bits = reinterpret_cast<const __m256i&>(narrow);
  if (lanes == kLanes) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
  } else {
    _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << lanes) - 1u), bits);
  }
}

inline void round_rows(const float* x, int64_t x_stride, int64_t rows, int64_t in, uint16_t* rounded,
                       int64_t rounded_stride) {
  const int64_t padded = round_up(in, kBf16Group);
  for (int64_t row = 0; row < rows; ++row, x += x_stride, rounded += rounded_stride) {
    for (int64_t i = 0; i < in; i += kLanes) {
      store_rounded(Vec::loadu(x + i, std::min(in - i, kLanes)), std::min(padded - i, kLanes), rounded + i);
    }
  }
}

// As rotate_row of rotary_kernel.h, on rounded numbers: it computes in fp32 and rounds again.
inline void rotate_row_bf16(uint16_t* row, int64_t heads, int64_t head_dim, const float* cos_sin) {
  const int64_t half = head_dim / 2;
  const auto wide = [](const uint16_t* from, __mmask16 mask) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
    return Vec(_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
  };
  for (int64_t head = 0; head < heads; ++head, row += head_dim) {
    for (int64_t i = 0; i < half; i += kLanes) {
      const int64_t lanes = std::min(half - i, kLanes);
      const auto mask = static_cast<__mmask16>((1u << lanes) - 1u);
      const Vec cos = Vec::loadu(cos_sin + i, lanes), sin = Vec::loadu(cos_sin + half + i, lanes);
      const Vec first = wide(row + i, mask), second = wide(row + half + i, mask);
      store_rounded(first * cos - second * sin, lanes, row + i);
      store_rounded(second * cos + first * sin, lanes, row + half + i);
    }
  }
}

// Calls visit(tile, sums) for each tile, with rows of 32 sums.
#if defined(__AMX_BF16__)
constexpr int64_t kBf16ChunkRows = kAmxChunkRows;

struct Bf16Product {
  static void add0() { _tile_dpbf16ps(0, 4, 6); }
  static void add1() { _tile_dpbf16ps(1, 4, 7); }
  static void add2() { _tile_dpbf16ps(2, 5, 6); }
  static void add3() { _tile_dpbf16ps(3, 5, 7); }
};

template <typename Visit>
void for_each_bf16_block(const Bf16LinearArgs& args, const NarrowRows& x, int64_t rows, const Visit& visit) {
  const int64_t depth = args.in * static_cast<int64_t>(sizeof(*args.panels));
  for_each_amx_block<Bf16Product, float>(args.panels, 0, depth, args.out, x, rows, visit);
}
#else
constexpr int64_t kBf16ChunkRows = kChunkRows;

template <typename Visit>
void for_each_bf16_block(const Bf16LinearArgs& args, const NarrowRows& x, int64_t rows, const Visit& visit) {
  const auto* const numbers = reinterpret_cast<const uint16_t*>(x.bytes);
  const int64_t stride = x.stride / static_cast<int64_t>(sizeof(*numbers));
  const int64_t steps = round_up(args.in, kBf16Group) / kBf16Group;
  const int64_t panel_numbers = steps * kBf16Group * kWeightPanel;
  alignas(64) float sums[kRegisterRows * kWeightPanel];
  for_each_tile(args.panels, steps * kStepBytes, steps, args.out, rows, [&](const Tile& tile) {
    multiply_pair_rows<kPanelVectors>(tile.rows, numbers + tile.first_row * stride, stride,
                                      args.panels + tile.panel * panel_numbers, steps, sums, kWeightPanel,
                                      false, tile.ahead);
    visit(tile, sums);
  });
}
#endif

// Calls visit(tile, values) for each tile, with its product as `finish_tile` takes it.
template <typename Visit>
void for_each_bf16_tile(const Bf16LinearArgs& args, const NarrowRows& x, int64_t rows, const Visit& visit) {
  for_each_bf16_block(args, x, rows, [&](const Tile& tile, const float* sums) {
    visit(tile, [&](int64_t column, int64_t) {
      const float* from = sums + column;
      return [from](int64_t row) { return Vec::loadu(from + row * kWeightPanel); };
    });
  });
}

inline void bf16_linear(const Bf16LinearArgs& args, const NarrowRows& x, int64_t rows, Finish finish,
                        float* out, int64_t out_stride) {
  for_each_bf16_tile(args, x, rows, [&](const Tile& tile, const auto& values) {
    finish_tile(tile, args.bias, finish, out, out_stride, values);
  });
}

// Lanes past the last hold finish(0), which is 0: they fill the row up to whole pairs.
inline void bf16_linear_bf16(const Bf16LinearArgs& args, const NarrowRows& x, int64_t rows, Finish finish,
                             uint16_t* out, int64_t out_stride) {
  for_each_bf16_tile(args, x, rows, [&](const Tile& tile, const auto& values) {
    finish_tile(tile, args.bias, finish, values,
                [&](int64_t row, int64_t column, int64_t lanes, const Vec& value) {
                  store_rounded(value, round_up(lanes, kBf16Group), out + row * out_stride + column);
                });
  });
}

}  // namespace pruned_ops::CPU_CAPABILITY

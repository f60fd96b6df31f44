// x weight^T in int8, in the manner of linear_kernel.h: a call owns some rows, keeps a tile of int32 sums in
// registers, brings them back to float, finishes and writes them once. The sums are exact, so they are the
// same on every processor; how they are made is told in the header of each.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/multiply_kernel.h"
#include "cpu/tile_kernel.h"
#if defined(__AMX_INT8__)
#include "cpu/int8_amx_kernel.h"
#elif defined(CPU_CAPABILITY_AVX512)
#include "cpu/int8_vnni_kernel.h"
#elif defined(CPU_CAPABILITY_AVX2)
#include "cpu/int8_avx2_kernel.h"
#elif defined(__ARM_FEATURE_MATMUL_INT8)
#include "cpu/int8_i8mm_kernel.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "cpu/int8_dotprod_kernel.h"
#else
#include "cpu/int8_plain_kernel.h"
#endif

namespace pruned_ops::CPU_CAPABILITY {

inline void quantize_rows(const float* x, int64_t x_stride, int64_t rows, int64_t in, const NarrowRows& out) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* values = x + row * x_stride;
    out.scales[row] = quantize_row(values, in, top_of(values, in), out.bytes + row * out.stride);
  }
}

#if defined(__AMX_INT8__)
constexpr int64_t kInt8ChunkRows = kAmxChunkRows;
#else
#if defined(CPU_CAPABILITY_AVX2)
// Processors whose widest vectors are these have 256 or 512 KB of L2: with 96 rows, int8 takes a tenth more
// time on MiniLM with 8 sequences, and as long on BERT-base.
constexpr int64_t kInt8ChunkRows = kChunkRows / 2;
#else
constexpr int64_t kInt8ChunkRows = kChunkRows;
#endif

// Picks the instance for a number of rows known when it runs: 1 <= rows <= kRows.
template <int kRows = kNarrowRows>
void multiply_int8_rows(int64_t rows, const uint8_t* x, int64_t x_stride, const int8_t* panel, int64_t steps,
                        int64_t columns, Ahead ahead, int32_t* sums) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return multiply_int8_rows<kRows - 1>(rows, x, x_stride, panel, steps, columns, ahead, sums);
    }
  }
  multiply_int8<kRows>(x, x_stride, panel, steps, columns, ahead, sums);
}

// Calls visit(tile, sums) for each tile, with rows of 32 sums.
template <typename Visit>
void for_each_int8_block(const Int8LinearArgs& args, const NarrowRows& x, int64_t rows, const Visit& visit) {
  const int64_t steps = (args.in + kInt8Group - 1) / kInt8Group;
  const int64_t panel_bytes = (1 + steps) * kStepBytes;
  alignas(64) int32_t sums[kNarrowRows * kWeightPanel];
  for_each_tile<kNarrowRows>(args.panels, panel_bytes, steps, args.out, rows, [&](const Tile& tile) {
    multiply_int8_rows(tile.rows, x.bytes + tile.first_row * x.stride, x.stride,
                       args.panels + tile.panel * panel_bytes, steps, tile.columns, tile.ahead, sums);
    visit(tile, sums);
  });
}
#endif

// Calls visit(tile, values) for each tile, with its product in floats as `finish_tile` takes it.
template <typename Visit>
void for_each_int8_tile(const Int8LinearArgs& args, const NarrowRows& x, int64_t rows, const Visit& visit) {
  for_each_int8_block(args, x, rows, [&](const Tile& tile, const int32_t* sums) {
    visit(tile, [&](int64_t column, int64_t lanes) {
      const Vec scale = Vec::loadu(args.scales + tile.first_column + column, lanes);
      const int32_t* at = sums + column;
      const float* row_scales = x.scales + tile.first_row;
      return [scale, at, row_scales](int64_t row) {
        return as_floats(at + row * kWeightPanel) * (scale * Vec(row_scales[row]));
      };
    });
  });
}

inline void int8_linear(const Int8LinearArgs& args, const NarrowRows& x, int64_t rows, Finish finish,
                        float* out, int64_t out_stride) {
  for_each_int8_tile(args, x, rows, [&](const Tile& tile, const auto& values) {
    finish_tile(tile, args.bias, finish, out, out_stride, values);
  });
}

#if defined(CPU_CAPABILITY_AVX512)
// x weight^T + bias in bfloat16. Halves are rounded away from zero, which the bits as integers do in one
// addition; what is not a number stays so, since quantised rows make only the one of it whose low bits are 0.
inline void int8_linear_bf16(const Int8LinearArgs& args, const NarrowRows& x, int64_t rows, uint16_t* out,
                             int64_t out_stride) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  for_each_int8_tile(args, x, rows, [&](const Tile& tile, const auto& values) {
    finish_tile(tile, args.bias, Finish::kBias, values,
                [&](int64_t row, int64_t column, int64_t, const Vec& value) {
                  const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(value), half);
                  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + row * out_stride + column),
                                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
                });
  });
}
constexpr auto kInt8LinearBf16 = int8_linear_bf16;
#else
constexpr auto kInt8LinearBf16 = nullptr;
#endif

// GELU or GEGLU of x weight^T + bias, quantised. The tiles keep the largest magnitudes of each row's lanes,
// so that the second pass knows the row's scale. GEGLU's GELU is the exact one: its errors are multiplied.
// Units that fill a panel up are 0, and no part of the row that is quantised: a kernel may end it with a sum.
inline void int8_linear_gelu(const Int8LinearArgs& args, const NarrowRows& x, int64_t rows, Finish finish,
                             int64_t width, float* inner, int64_t inner_stride, const NarrowRows& out) {
  if (rows > kChunkRows) {
    // In halves: `inner` of more rows leaves too little of L2 to the weights.
    const int64_t first = round_up(rows / 2, 16);
    int8_linear_gelu(args, x, first, finish, width, inner, inner_stride, out);
    return int8_linear_gelu(args, x.from(first), rows - first, finish, width, inner, inner_stride,
                            out.from(first));
  }
  const bool gated = finish == Finish::kBiasGeglu;
  alignas(64) int32_t tops[kChunkRows * kLanes];
  std::fill(tops, tops + rows * kLanes, 0);
  using Bits = at::vec::Vectorized<int32_t>;
  const Bits magnitude(0x7fffffff);
  for_each_int8_tile(args, x, rows, [&](const Tile& tile, const auto& values) {
    finish_tile(tile, args.bias, gated ? finish : Finish::kBias, values,
                [&](int64_t row, int64_t column, int64_t lanes, Vec value) {
                  if (!gated) value = gelu_for_int8(value);
                  store_lanes(value, lanes, inner + row * inner_stride + column);
                  // Lanes past the last hold GELU(0). Of two magnitudes, the bits of the larger are the
                  // larger integer; those of what is not a number are the largest of all.
                  int32_t* top = tops + row * kLanes;
                  const Bits bits = at::vec::cast<int32_t>(value) & magnitude;
                  at::vec::maximum(Bits::loadu(top), bits).store(top);
                });
  });
  for (int64_t row = 0; row < rows; ++row) {
    const int32_t* lanes = tops + row * kLanes;
    const float top = std::bit_cast<float>(*std::max_element(lanes, lanes + kLanes));
    out.scales[row] = quantize_row(inner + row * inner_stride, width, top, out.bytes + row * out.stride);
  }
}

}  // namespace pruned_ops::CPU_CAPABILITY

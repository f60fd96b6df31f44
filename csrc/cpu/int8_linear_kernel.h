// x weight^T in int8, in the manner of linear_kernel.h: a call owns some rows, keeps a tile of int32 sums in
// registers, brings them back to float, finishes and writes them once. The sums are exact, so they are the
// same on every processor; how they are made is told in the header of each.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/multiply_kernel.h"
#include "cpu/tile_kernel.h"
#if defined(CPU_CAPABILITY_AVX512)
#include "cpu/int8_vnni_kernel.h"
#elif defined(CPU_CAPABILITY_AVX2)
#include "cpu/int8_avx2_kernel.h"
#else
#include "cpu/int8_plain_kernel.h"
#endif

namespace pruned_ops::CPU_CAPABILITY {

// Picks the instance for a number of rows known when it runs: 1 <= rows <= kRows.
template <int kRows = kInt8Rows>
void multiply_int8_rows(int64_t rows, const uint8_t* x, int64_t x_stride, const int8_t* panel, int64_t steps,
                        int64_t columns, Ahead ahead, int32_t* sums) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return multiply_int8_rows<kRows - 1>(rows, x, x_stride, panel, steps, columns, ahead, sums);
    }
  }
  multiply_int8<kRows>(x, x_stride, panel, steps, columns, ahead, sums);
}

inline void int8_linear(const Int8LinearArgs& args, const uint8_t* x, int64_t x_stride, const float* x_scales,
                        int64_t rows, Finish finish, float* out, int64_t out_stride) {
  const int64_t steps = (args.in + kInt8Group - 1) / kInt8Group;
  const int64_t panel_bytes = (1 + steps) * kStepBytes;
  alignas(64) int32_t sums[kInt8Rows * kWeightPanel];
  for_each_tile<kInt8Rows>(args.panels, panel_bytes, steps, args.out, rows, [&](const Tile& tile) {
    multiply_int8_rows(tile.rows, x + tile.first_row * x_stride, x_stride,
                       args.panels + tile.panel * panel_bytes, steps, tile.columns, tile.ahead, sums);
    finish_tile(tile, args.bias, finish, out, out_stride, [&](int64_t column, int64_t lanes) {
      const Vec scale = Vec::loadu(args.scales + tile.first_column + column, lanes);
      const int32_t* at = sums + column;
      const float* row_scales = x_scales + tile.first_row;
      return [scale, at, row_scales](int64_t row) {
        return as_floats(at + row * kWeightPanel) * (scale * Vec(row_scales[row]));
      };
    });
  });
}

}  // namespace pruned_ops::CPU_CAPABILITY

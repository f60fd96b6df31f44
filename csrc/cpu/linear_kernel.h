// x weight^T with what follows it. A call owns some rows, keeps a tile of the result in L1, finishes it
// (bias, GELU) and writes it once.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/multiply_kernel.h"
#include "cpu/tile_kernel.h"

namespace pruned_ops::CPU_CAPABILITY {

inline void linear(const LinearArgs& args, const float* x, int64_t x_stride, int64_t rows, Finish finish,
                   float* out, int64_t out_stride) {
  const int64_t panel_floats = args.in * kWeightPanel;
  alignas(64) float sums[kRegisterRows * kWeightPanel];
  for_each_tile(args.panels, args.in * kStepBytes, args.in, args.out, rows, [&](const Tile& tile) {
    const float* weight = args.panels + tile.panel * panel_floats;
    const float* left = x + tile.first_row * x_stride;
    int64_t column = 0;
    for (; column + kLanes < tile.columns; column += kPanel) {
      multiply_rows<kPanelVectors>(tile.rows, left, x_stride, weight + column, kWeightPanel, args.in,
                                   sums + column, kWeightPanel, false, tile.ahead);
    }
    if (column < tile.columns) {
      multiply_rows<1>(tile.rows, left, x_stride, weight + column, kWeightPanel, args.in, sums + column,
                       kWeightPanel, false, tile.ahead);
    }
    finish_tile(tile, args.bias, finish, out, out_stride, [&](int64_t at, int64_t) {
      const float* from = sums + at;
      return [from](int64_t row) { return Vec::loadu(from + row * kWeightPanel); };
    });
  });
}

}  // namespace pruned_ops::CPU_CAPABILITY

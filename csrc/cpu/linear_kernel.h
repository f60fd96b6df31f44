// x weight^T with what follows it. A call owns some rows, keeps tiles of the result in L1, finishes them
// (bias, GELU) and writes them once.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/multiply_kernel.h"
#include "cpu/tile_kernel.h"

namespace pruned_ops::CPU_CAPABILITY {

#if defined(CPU_CAPABILITY_AVX2)
// With 16 registers a tile passes over a panel every 6 rows, and L1 has no room for a panel. So only as many
// of its inputs come at once, 128 bytes each, as stay in L1 while all rows pass over them.
constexpr int64_t kDepthBlock = 128;

inline void linear(const LinearArgs& args, const float* x, int64_t x_stride, int64_t rows, Finish finish,
                   float* out, int64_t out_stride) {
  alignas(64) float sums[kChunkRows * kWeightPanel];
  const auto multiply_tile = [&](const Tile& tile, int64_t first, int64_t depth) {
    const float* const left = x + tile.first_row * x_stride + first;
    const float* weight = args.panels + (tile.panel * args.in + first) * kWeightPanel;
    float* const of_tile = sums + tile.first_row * kWeightPanel;
    Ahead ahead = tile.ahead;
    int64_t column = 0;
    for (; column + kLanes < tile.columns; column += kPanel, ahead.from += depth * ahead.step) {
      multiply_rows<kPanelVectors>(tile.rows, left, x_stride, weight + column, kWeightPanel, depth,
                                   of_tile + column, kWeightPanel, first > 0, ahead);
    }
    if (column < tile.columns) {
      multiply_rows<1>(tile.rows, left, x_stride, weight + column, kWeightPanel, depth, of_tile + column,
                       kWeightPanel, first > 0, ahead);
    }
    if (first + depth < args.in) return;
    finish_tile(tile, args.bias, finish, out, out_stride, [&](int64_t at, int64_t) {
      const float* from = of_tile + at;
      return [from](int64_t row) { return Vec::loadu(from + row * kWeightPanel); };
    });
  };
  for_each_deep_tile(args.panels, args.in, kDepthBlock, args.out, rows, multiply_tile);
}
#else
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
#endif

}  // namespace pruned_ops::CPU_CAPABILITY

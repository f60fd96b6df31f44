// x weight^T with what follows it. A call owns some rows; for every panel of the weight it passes over blocks
// of kRegisterRows rows, keeps a tile of the result in L1, finishes it (bias, GELU) and writes it once. The
// next panel is brought into L2 meanwhile.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>

#include "cpu/gelu_kernel.h"
#include "cpu/kernels.h"
#include "cpu/multiply_kernel.h"

namespace pruned_ops::CPU_CAPABILITY {

// tile (rows, kWeightPanel) -> out, `columns` wide.
inline void finish_tile(const float* tile, int64_t rows, int64_t columns, const float* bias, Finish finish,
                        float* out, int64_t out_stride) {
  for (int64_t column = 0; column < columns; column += kLanes) {
    const int64_t lanes = std::min(columns - column, kLanes);
    const Vec added = bias == nullptr ? Vec(0.0f) : Vec::loadu(bias + column, lanes);
    for (int64_t row = 0; row < rows; ++row) {
      Vec value = Vec::loadu(tile + row * kWeightPanel + column) + added;
      if (finish == Finish::kBiasGelu) value = gelu(value);
      float* target = out + row * out_stride + column;
      if (lanes == kLanes) {
        value.store(target);
      } else {
        value.store(target, static_cast<int>(lanes));
      }
    }
  }
}

inline void linear(const LinearArgs& args, const float* x, int64_t x_stride, int64_t rows, Finish finish,
                   float* out, int64_t out_stride) {
  // Even blocks: of 64 rows, six of 10 or 11 rather than five of 12 and one of 4, which would wait for B.
  const int64_t blocks = (rows + kRegisterRows - 1) / kRegisterRows;
  const int64_t panels = (args.out + kWeightPanel - 1) / kWeightPanel;
  const int64_t panel_floats = args.in * kWeightPanel;
  // Bytes of the next panel for each depth step of each block.
  const int64_t dose = blocks > 0 ? kWeightPanel * static_cast<int64_t>(sizeof(float)) / blocks + 1 : 0;
  alignas(64) float tile[kRegisterRows * kWeightPanel];
  for (int64_t panel = 0; panel < panels; ++panel) {
    const float* weight = args.panels + panel * panel_floats;
    const float* next = panel + 1 < panels ? weight + panel_floats : weight;
    const int64_t first = panel * kWeightPanel;
    const int64_t columns = std::min(args.out - first, kWeightPanel);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t begin = rows * block / blocks;
      const int64_t count = rows * (block + 1) / blocks - begin;
      const Ahead ahead = {reinterpret_cast<const char*>(next) + block * dose * args.in, dose};
      int64_t column = 0;
      for (; column + kLanes < columns; column += kPanel) {
        multiply_rows<kPanelVectors>(count, x + begin * x_stride, x_stride, weight + column, kWeightPanel,
                                     args.in, tile + column, kWeightPanel, false, ahead);
      }
      if (column < columns) {
        multiply_rows<1>(count, x + begin * x_stride, x_stride, weight + column, kWeightPanel, args.in,
                         tile + column, kWeightPanel, false, ahead);
      }
      const float* bias = finish == Finish::kNothing ? nullptr : args.bias + first;
      finish_tile(tile, count, columns, bias, finish, out + begin * out_stride + first, out_stride);
    }
  }
}

}  // namespace pruned_ops::CPU_CAPABILITY

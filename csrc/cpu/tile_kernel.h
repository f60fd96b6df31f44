// The order in which a product with a weight in panels is computed, in any dtype, and how a tile of it
// becomes output. The panels of the weight come one after the other, each over blocks of rows; the next panel
// is brought into L2 meanwhile.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>

#include "cpu/gelu_kernel.h"
#include "cpu/kernels.h"
#include "cpu/multiply_kernel.h"

namespace pruned_ops::CPU_CAPABILITY {

struct Tile {
  int64_t panel;  // its number
  int64_t first_column, columns;
  int64_t first_row, rows;
  Ahead ahead;
};

// Calls visit(tile) for all tiles of (rows, out), of kRows rows or fewer. panel_bytes: the size of a panel.
// steps: depth steps of the product.
template <int kRows = kRegisterRows, typename Visit>
inline void for_each_tile(const void* panels, int64_t panel_bytes, int64_t steps, int64_t out, int64_t rows,
                          const Visit& visit) {
  // Even blocks: of 64 rows, six of 10 or 11 rather than five of 12 and one of 4, which would wait for B.
  const int64_t blocks = (rows + kRows - 1) / kRows;
  const int64_t count = (out + kWeightPanel - 1) / kWeightPanel;
  // Bytes of the next panel for each depth step of each block.
  const int64_t dose = blocks > 0 ? kStepBytes / blocks + 1 : 0;
  for (int64_t panel = 0; panel < count; ++panel) {
    const char* next = static_cast<const char*>(panels) + std::min(panel + 1, count - 1) * panel_bytes;
    const int64_t first = panel * kWeightPanel;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t begin = rows * block / blocks;
      visit(Tile{panel, first, std::min(out - first, kWeightPanel), begin,
                 rows * (block + 1) / blocks - begin, Ahead{next + block * dose * steps, dose}});
    }
  }
}

// Calls visit(tile, first, depth) for all tiles of an fp32 weight and even blocks of their depth, which are
// the inputs from `first` on: of each panel, the blocks of its depth one after the other, each over all rows.
// What lies ahead is the next block.
template <typename Visit>
inline void for_each_deep_tile(const float* panels, int64_t in, int64_t most_depth, int64_t out, int64_t rows,
                               const Visit& visit) {
  const int64_t blocks = (rows + kRegisterRows - 1) / kRegisterRows;
  const int64_t count = (out + kWeightPanel - 1) / kWeightPanel;
  const int64_t depths = std::max<int64_t>(1, (in + most_depth - 1) / most_depth);
  // Bytes of the next block for each depth step of each half of a tile.
  const int64_t dose = blocks > 0 ? kStepBytes / 2 / blocks + 1 : 0;
  for (int64_t panel = 0; panel < count; ++panel) {
    const int64_t column = panel * kWeightPanel;
    for (int64_t part = 0; part < depths; ++part) {
      const int64_t first = in * part / depths, depth = in * (part + 1) / depths - first;
      const bool is_last = panel + 1 == count && part + 1 == depths;
      const char* const next =
          reinterpret_cast<const char*>(panels) + (panel * in + first + (is_last ? 0 : depth)) * kStepBytes;
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t begin = rows * block / blocks;
        visit(Tile{panel, column, std::min(out - column, kWeightPanel), begin,
                   rows * (block + 1) / blocks - begin, Ahead{next + 2 * block * dose * depth, dose}},
              first, depth);
      }
    }
  }
}

inline void store_lanes(const Vec& value, int64_t lanes, float* to) {
  if (lanes == kLanes) {
    value.store(to);
  } else {
    value.store(to, static_cast<int>(lanes));
  }
}

// Calls store(row, column, lanes, finish(values + bias)) for the tile's vectors, with the row and the column
// of the whole output. values(column, lanes) gives a function of the tile's row, which gives those columns of
// the tile. GEGLU's output has a column for every two of the product: those of a panel, 16 apart.
template <typename Values, typename Store>
inline void finish_tile(const Tile& tile, const float* bias, Finish finish, const Values& values,
                        const Store& store) {
  if (finish == Finish::kBiasGeglu) {
    static_assert(kGatedUnits % kLanes == 0);
    const float* const gate_bias = bias + tile.first_column;
    for (int64_t unit = 0; unit < kGatedUnits; unit += kLanes) {
      const Vec gate_added = Vec::loadu(gate_bias + unit);
      const Vec up_added = Vec::loadu(gate_bias + kGatedUnits + unit);
      const auto gate_of = values(unit, kLanes);
      const auto up_of = values(kGatedUnits + unit, kLanes);
      for (int64_t row = 0; row < tile.rows; ++row) {
        store(tile.first_row + row, tile.panel * kGatedUnits + unit, kLanes,
              gelu(gate_of(row) + gate_added) * (up_of(row) + up_added));
      }
    }
    return;
  }
  for (int64_t column = 0; column < tile.columns; column += kLanes) {
    const int64_t lanes = std::min(tile.columns - column, kLanes);
    const Vec added =
        finish == Finish::kNothing ? Vec(0.0f) : Vec::loadu(bias + tile.first_column + column, lanes);
    const auto value_of = values(column, lanes);
    for (int64_t row = 0; row < tile.rows; ++row) {
      Vec value = value_of(row) + added;
      if (finish == Finish::kBiasGelu) value = gelu(value);
      store(tile.first_row + row, tile.first_column + column, lanes, value);
    }
  }
}

// finish(values + bias) -> the tile's place in out.
template <typename Values>
inline void finish_tile(const Tile& tile, const float* bias, Finish finish, float* out, int64_t out_stride,
                        const Values& values) {
  finish_tile(tile, bias, finish, values, [&](int64_t row, int64_t column, int64_t lanes, const Vec& value) {
    store_lanes(value, lanes, out + row * out_stride + column);
  });
}

}  // namespace pruned_ops::CPU_CAPABILITY

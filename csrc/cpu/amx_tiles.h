// x weight^T by AMX, whose registers are eight tiles of 16 rows of 64 bytes; one instruction multiplies two
// of them and adds the products to a third. A call owns some rows and takes blocks of them, two tiles high,
// through each panel: four tiles of sums stay in registers over the whole depth. A block's sums then lie in
// L1 for the caller. A tile of a panel is 16 of its steps, half as wide: the layout is that of panels.h.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/tile_kernel.h"
#include "panels.h"

namespace pruned_ops::CPU_CAPABILITY {

constexpr int64_t kAmxRows = 16;                           // of a tile
constexpr int64_t kAmxBytes = 64;                          // of a tile's row
constexpr int64_t kAmxPanelBytes = kAmxRows * kStepBytes;  // of a panel, for two tiles side by side
constexpr int64_t kStepRowBytes = kAmxBytes / kAmxRows;    // of a row of x, that one step multiplies
constexpr int64_t kAmxBlock = 2 * kAmxRows;

// The compiler does not know which memory the instructions below read and write.
inline void order_memory(const void* touched) {
  asm volatile("" : : "r"(touched) : "memory");
}

// Shapes this thread's tiles as long as it lives: tiles 0 to 5, for sums and x, have `rows` rows, 6 and 7,
// for the weight, 16. Then the thread has no tiles again, as other libraries that use them expect it, which
// shape their own. Both take as long as a dozen products of tiles.
class AmxShapes {
 public:
  explicit AmxShapes(int64_t rows) {
    struct {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } shapes = {1, 0, {}, {}, {}};
    static_assert(sizeof(shapes) == 64);
    for (int tile = 0; tile < 8; ++tile) {
      shapes.row_bytes[tile] = kAmxBytes;
      shapes.rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : kAmxRows);
    }
    order_memory(&shapes);
    _tile_loadconfig(&shapes);
  }
  ~AmxShapes() { _tile_release(); }
  AmxShapes(const AmxShapes&) = delete;
  AmxShapes& operator=(const AmxShapes&) = delete;
};

// One operand: whole tiles from `whole` on, and one more, where its depth ends within a tile.
struct AmxOperand {
  const uint8_t* whole;
  int64_t stride;  // bytes from row to row of x
  const uint8_t* rest;
};

// sums (kTiles * rows, 32) = x times a panel, `tiles` whole tiles deep, and the rest where there is one.
// Brings the next panel into L2. Product::add0 to add3 add to the tile of that number the product of tile 4
// or 5, of x, and of 6 or 7, of the weight.
template <int kTiles, typename Product>
void multiply_amx(const AmxOperand& x, int64_t rows, const AmxOperand& panel, int64_t tiles, Ahead ahead,
                  void* sums) {
  order_memory(sums);
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kTiles == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  const auto add = [rows](const uint8_t* left, int64_t stride, const uint8_t* right) {
    _tile_loadd(6, right, kStepBytes);
    _tile_loadd(4, left, stride);
    Product::add0();
    _tile_loadd(7, right + kAmxBytes, kStepBytes);
    Product::add1();
    if constexpr (kTiles == 2) {
      _tile_loadd(5, left + rows * stride, stride);
      Product::add2();
      Product::add3();
    }
  };
  for (int64_t tile = 0; tile < tiles; ++tile) {
    add(x.whole + tile * kAmxBytes, x.stride, panel.whole + tile * kAmxPanelBytes);
    const char* const next = ahead.from + tile * ahead.step;
    for (int64_t line = 0; line < ahead.step; line += kAmxBytes) __builtin_prefetch(next + line, 0, 2);
  }
  if (x.rest != nullptr) add(x.rest, kAmxBytes, panel.rest);
  auto* const out = static_cast<uint8_t*>(sums);
  _tile_stored(0, out, kStepBytes);
  _tile_stored(1, out + kAmxBytes, kStepBytes);
  if constexpr (kTiles == 2) {
    _tile_stored(2, out + rows * kStepBytes, kStepBytes);
    _tile_stored(3, out + rows * kStepBytes + kAmxBytes, kStepBytes);
  }
  order_memory(sums);
}

// Calls visit(tile, sums) for all blocks of (rows, out), of kAmxBlock rows or fewer, with rows of 32 sums.
// depth: bytes of a row of x that the weight multiplies. start: bytes of a panel before its first step.
// Rows past the last may be read, up to a whole number of 16, and add nothing to the others.
template <typename Product, typename Sum, typename Visit>
void for_each_amx_block(const void* panels, int64_t start, int64_t depth, int64_t out, const NarrowRows& x,
                        int64_t rows, const Visit& visit) {
  if (rows == 0) return;
  // Even tiles: of 40 rows, three of 14 rather than of 16, 16 and 8. Fewer rows take less time.
  const int64_t row_tiles = (rows + kAmxRows - 1) / kAmxRows;
  const int64_t tile_rows = (rows + row_tiles - 1) / row_tiles;
  const int64_t blocks = (row_tiles + 1) / 2;
  const int64_t steps = (depth + kStepRowBytes - 1) / kStepRowBytes;
  const int64_t tiles = depth / kAmxBytes;
  const int64_t panel_bytes = start + steps * kStepBytes;
  const int64_t count = (out + kWeightPanel - 1) / kWeightPanel;
  const Ahead ahead = {nullptr, tiles > 0 ? panel_bytes / (blocks * tiles) : 0};

  alignas(64) uint8_t x_rest[kAmxChunkRows * kAmxBytes];
  alignas(64) uint8_t panel_rest[kAmxPanelBytes] = {};
  const int64_t rest = depth % kAmxBytes;
  for (int64_t row = 0; rest != 0 && row < rows; ++row) {
    const auto mask = static_cast<__mmask64>((uint64_t{1} << rest) - 1);
    _mm512_store_si512(x_rest + row * kAmxBytes,
                       _mm512_maskz_loadu_epi8(mask, x.bytes + row * x.stride + tiles * kAmxBytes));
  }

  const AmxShapes shapes(tile_rows);
  alignas(64) Sum sums[kAmxBlock * kWeightPanel];
  for (int64_t panel = 0; panel < count; ++panel) {
    const auto* const begin = static_cast<const uint8_t*>(panels) + panel * panel_bytes;
    const auto* const next = static_cast<const char*>(panels) + std::min(panel + 1, count - 1) * panel_bytes;
    const AmxOperand weight = {begin + start, kStepBytes, panel_rest};
    if (rest != 0) {
      const int64_t whole = tiles * kAmxPanelBytes;
      std::memcpy(panel_rest, weight.whole + whole, static_cast<size_t>(steps * kStepBytes - whole));
    }
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * 2 * tile_rows;
      const AmxOperand left = {x.bytes + first * x.stride, x.stride,
                               rest != 0 ? x_rest + first * kAmxBytes : nullptr};
      const Tile tile = {panel,
                         panel * kWeightPanel,
                         std::min(out - panel * kWeightPanel, kWeightPanel),
                         first,
                         std::min(rows - first, 2 * tile_rows),
                         {next + block * tiles * ahead.step, ahead.step}};
      if (tile.rows > tile_rows) {
        multiply_amx<2, Product>(left, tile_rows, weight, tiles, tile.ahead, sums);
      } else {
        multiply_amx<1, Product>(left, tile_rows, weight, tiles, tile.ahead, sums);
      }
      visit(tile, sums);
    }
  }
}

}  // namespace pruned_ops::CPU_CAPABILITY

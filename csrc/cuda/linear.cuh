// x weight^T and what follows it number by number, for linear_gelu and linear_add_layer_norm.
//
// A block owns a tile of the output, a warp a part of it, whose sums it keeps in registers while tiles of x
// and weight pass through shared memory, several on their way at a time; it writes the tile by way of shared
// memory, 16 bytes a thread.
#pragma once

#include "kernels.h"
#include "tile.cuh"

namespace pruned_ops::cuda {

// ROWS x COLUMNS of the output a block, WARP_ROWS x WARP_COLUMNS a warp; BLOCKS of a multiprocessor.
template <int ROWS, int COLUMNS, int WARP_ROWS, int WARP_COLUMNS, int BLOCKS>
struct Shape {
  static constexpr int kRows = ROWS;
  static constexpr int kColumns = COLUMNS;
  static constexpr int kWarpRows = WARP_ROWS;
  static constexpr int kWarpColumns = WARP_COLUMNS;
  static constexpr int kBlocks = BLOCKS;
  static constexpr int kThreads = ROWS / WARP_ROWS * (COLUMNS / WARP_COLUMNS) * 32;
  static constexpr int kDepth = 32;  // numbers of a row of x and weight at a time
  static constexpr int kStages = 4;  // of which three are on their way
};

// 128 registers a thread either way: 64 of them sums in a large tile, 32 in a small one, of which twice as
// many blocks come about.
using LargeShape = Shape<128, 128, 64, 32, 2>;
using SmallShape = Shape<64, 64, 32, 32, 4>;

template <class T, class S>
struct LinearMemory {
  using X = Tile<T, S::kRows, S::kDepth>;
  using Weight = Tile<T, S::kColumns, S::kDepth>;
  using Out = Tile<T, S::kRows, S::kColumns>;
  static constexpr int kStageNumbers = X::kNumbers + Weight::kNumbers;
  static constexpr int kBytes = S::kStages * kStageNumbers * static_cast<int>(sizeof(T));
  static_assert(Out::kBytes <= kBytes && S::kBlocks * (kBytes + 1024) <= 164 * 1024);

  Shared<T> base = shared_memory<T>();

  PRUNED_OPS_DEVICE X x(int step) const { return {base + step % S::kStages * kStageNumbers}; }
  PRUNED_OPS_DEVICE Weight weight(int step) const {
    return {base + (step % S::kStages * kStageNumbers + X::kNumbers)};
  }
  PRUNED_OPS_DEVICE Out out() const { return {base}; }
};

// One warp's part of the output tile, that begins at (row, column) of it.
template <class T, class S>
struct Sums {
  static constexpr int kRowTiles = S::kWarpRows / 16;
  static constexpr int kColumnTiles = S::kWarpColumns / 8;
  int row, column;
  float values[kRowTiles][kColumnTiles][4];

  PRUNED_OPS_DEVICE Sums() {
    const int warp = thread_index() / 32;
    constexpr int kAcross = S::kColumns / S::kWarpColumns;
    row = warp / kAcross * S::kWarpRows;
    column = warp % kAcross * S::kWarpColumns;
#pragma unroll
    for (int i = 0; i < kRowTiles * kColumnTiles * 4; ++i) {
      values[i / 4 / kColumnTiles][i / 4 % kColumnTiles][i % 4] = 0.0f;
    }
  }

  PRUNED_OPS_DEVICE void add(typename LinearMemory<T, S>::X x, typename LinearMemory<T, S>::Weight weight) {
#pragma unroll
    for (int chunk = 0; chunk < S::kDepth / kChunk; chunk += 2) {
      uint32_t a[kRowTiles][4], b[kColumnTiles / 2][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) x.read_a(a[i], row + 16 * i, chunk);
#pragma unroll
      for (int j = 0; j < kColumnTiles / 2; ++j) weight.read_b(b[j], column + 16 * j, chunk);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) {
          mma_m16n8k16<T>(values[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }

  // The finished numbers to the output tile. bias, columns: of the tile.
  template <class Finish>
  PRUNED_OPS_DEVICE void finish(typename LinearMemory<T, S>::Out out, Global<const T> bias,
                                int columns) const {
    const int lane = thread_index() % 32;
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      const int first = column + 8 * j + lane % 4 * 2;
      float shift[2] = {0.0f, 0.0f};
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (Finish::kBias && first + k < columns) shift[k] = to_float(bias[first + k]);
      }
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int k = 0; k < 4; k += 2) {
          const float low = Finish::of(values[i][j][k] + shift[0]);
          const float high = Finish::of(values[i][j][k + 1] + shift[1]);
          store_32<T>(out.at(row + 16 * i + lane / 4 + 4 * k, column / 8 + j) + lane % 4 * 2,
                      pack<T>(low, high));
        }
      }
    }
  }
};

// ALIGNED: x and weight lie at multiples of 16 bytes and `in` is one of 8 numbers.
template <class T, class S, bool ALIGNED, class Finish>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    linear_kernel(Global<const T> x, Global<const T> weight, Global<const T> bias, Global<T> out, int tokens,
                  int in, int width, int64_t stride_x, int64_t stride_weight, bool aligned_out) {
  const LinearMemory<T, S> memory;
  // Blocks in turn share their rows of x.
  const int across = (width + S::kColumns - 1) / S::kColumns;
  const int row = static_cast<int>(block_index().x) / across * S::kRows;
  const int column = static_cast<int>(block_index().x) % across * S::kColumns;
  const int rows = tokens - row, columns = width - column;
  const Global<const T> own_x = x + row * stride_x;
  const Global<const T> own_weight = weight + column * stride_weight;
  const auto copy = [&](int step) {
    const int first = step * S::kDepth;
    if (first < in) {
      constexpr int kThreads = S::kThreads;
      if (ALIGNED) {
        memory.x(step).template copy_async<kThreads>(own_x + first, stride_x, rows, in - first);
        memory.weight(step).template copy_async<kThreads>(own_weight + first, stride_weight, columns,
                                                          in - first);
      } else {
        memory.x(step).template copy<kThreads>(own_x + first, stride_x, rows, in - first);
        memory.weight(step).template copy<kThreads>(own_weight + first, stride_weight, columns, in - first);
      }
    }
    cp_async_commit();  // with nothing in it, too: the wait counts groups
  };
#pragma unroll
  for (int step = 0; step < S::kStages - 1; ++step) copy(step);
  Sums<T, S> sums;
  const int steps = (in + S::kDepth - 1) / S::kDepth;
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<S::kStages - 2>();
    sync_threads();
    copy(step + S::kStages - 1);  // where the step before this one was read
    sums.add(memory.x(step), memory.weight(step));
  }
  sync_threads();
  sums.template finish<Finish>(memory.out(), bias + (Finish::kBias ? column : 0), columns);
  sync_threads();

  const Global<T> own_out = out + (static_cast<int64_t>(row) * width + column);
  for (int i = thread_index(); i < S::kRows * S::kColumns / kChunk; i += S::kThreads) {
    const int r = i / (S::kColumns / kChunk), chunk = i % (S::kColumns / kChunk);
    if (r >= rows || chunk * kChunk >= columns) continue;
    const Global<T> to = own_out + (static_cast<int64_t>(r) * width + chunk * kChunk);
    const Shared<T> from = memory.out().at(r, chunk);
    if (aligned_out) {
      store_128<T>(to, load_128<T>(from));
    } else {
      for (int j = 0; j < min(kChunk, columns - chunk * kChunk); ++j) to[j] = from[j];
    }
  }
}

template <class T, class S, bool ALIGNED, class Finish>
const char* start_linear(const Linear& a, void* stream) {
  const int64_t blocks = static_cast<int64_t>((a.tokens + S::kRows - 1) / S::kRows) *
                         ((a.width + S::kColumns - 1) / S::kColumns);
  return launch(linear_kernel<T, S, ALIGNED, Finish>, {static_cast<unsigned>(blocks)}, S::kThreads,
                LinearMemory<T, S>::kBytes, stream, static_cast<const T*>(a.x),
                static_cast<const T*>(a.weight), static_cast<const T*>(a.bias), static_cast<T*>(a.out),
                a.tokens, a.in, a.width, a.stride_x, a.stride_weight, is_aligned(a.out, a.width, sizeof(T)));
}

// Finish: `of` is what becomes of a number, after the bias if kBias.
template <class T, class Finish>
const char* start_linear(const Linear& a, void* stream) {
  const bool aligned = is_aligned(a.x, a.stride_x, sizeof(T)) &&
                       is_aligned(a.weight, a.stride_weight, sizeof(T)) && a.in % kChunk == 0;
  if (!aligned) return start_linear<T, SmallShape, false, Finish>(a, stream);
  // Large tiles read less; small ones are more, and keep all multiprocessors at work.
  const int64_t large = static_cast<int64_t>((a.tokens + LargeShape::kRows - 1) / LargeShape::kRows) *
                        ((a.width + LargeShape::kColumns - 1) / LargeShape::kColumns);
  return large >= multiprocessors() ? start_linear<T, LargeShape, true, Finish>(a, stream)
                                    : start_linear<T, SmallShape, true, Finish>(a, stream);
}

}  // namespace pruned_ops::cuda

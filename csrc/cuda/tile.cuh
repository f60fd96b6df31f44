// A tile of a matrix of 16-bit numbers in shared memory, for ldmatrix.
//
// Chunks of 8 numbers (16 bytes) are permuted within their row, so that the same chunk of 8 rows in turn lies
// in different banks: ldmatrix then reads a matrix in one go.
#pragma once

#include "ptx.cuh"

namespace pruned_ops::cuda {

constexpr int kChunk = 8;

template <class T, int ROWS, int COLUMNS>
struct Tile {
  static constexpr int kChunks = COLUMNS / kChunk;
  static constexpr int kNumbers = ROWS * COLUMNS;
  static constexpr int kBytes = kNumbers * static_cast<int>(sizeof(T));
  static_assert(kChunks == 4 || kChunks % 8 == 0);

  Shared<T> numbers;

  PRUNED_OPS_DEVICE Shared<T> at(int row, int chunk) const {
    // Where a row has 64 bytes, two share the banks.
    const int permutation = kChunks == 4 ? row / 2 % 4 : row % 8;
    return numbers + (row * COLUMNS + (chunk ^ permutation) * kChunk);
  }

  // Start copying rows and columns that begin at `from`; zeros from `rows` or `columns` on. By all THREADS
  // threads of the block. Everything lies at multiples of 16 bytes, so `columns` is a multiple of 8.
  template <int THREADS>
  PRUNED_OPS_DEVICE void copy_async(Global<const T> from, int64_t stride, int rows, int columns) const {
    // A thread copies the same chunk of every kStep-th row, and steps by constants.
    constexpr int kStep = THREADS / kChunks;
    static_assert(THREADS % kChunks == 0 && kStep % 8 == 0 && ROWS % kStep == 0);
    const int row = thread_index() / kChunks, chunk = thread_index() % kChunks;
    const bool inside = chunk * kChunk < columns;
    const Shared<T> to = at(row, chunk);
    from = from + (row * stride + chunk * kChunk);
#pragma unroll
    for (int i = 0; i < ROWS; i += kStep) {
      cp_async_128<T>(to + i * COLUMNS, from + i * stride, inside && row + i < rows);
    }
  }

  // The same number by number, for what lies anywhere; it is there after the next barrier.
  template <int THREADS>
  PRUNED_OPS_DEVICE void copy(Global<const T> from, int64_t stride, int rows, int columns) const {
#pragma unroll 1
    for (int i = thread_index(); i < ROWS * kChunks; i += THREADS) {
      const int row = i / kChunks, chunk = i % kChunks;
      T values[kChunk];
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        const int column = chunk * kChunk + j;
        values[j] = row < rows && column < columns ? from[row * stride + column] : T{};
      }
      Bits128 bits;
      memcpy(&bits, values, sizeof(bits));
      store_128<T>(at(row, chunk), bits);
    }
  }

  // The fragment of `a` (16 x 16) at this row and chunk, for mma_m16n8k16.
  PRUNED_OPS_DEVICE void read_a(uint32_t (&a)[4], int row, int chunk) const {
    const int lane = thread_index() % 32;
    ldmatrix_x4<T>(a, at(row + lane % 16, chunk + lane / 16));
  }

  // Two fragments of `b` (16 x 8) from a tile that holds b's columns as rows: rows `row` to `row + 15`; b[0],
  // b[1] are the first's, b[2], b[3] the second's.
  PRUNED_OPS_DEVICE void read_b(uint32_t (&b)[4], int row, int chunk) const {
    const int lane = thread_index() % 32;
    ldmatrix_x4<T>(b, at(row + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2));
  }

  // The same from a tile that holds b as it is: 16 rows from `row` and 16 columns from `chunk`.
  PRUNED_OPS_DEVICE void read_b_by_rows(uint32_t (&b)[4], int row, int chunk) const {
    const int lane = thread_index() % 32;
    ldmatrix_x4_transposed<T>(b, at(row + lane % 16, chunk + lane / 16));
  }
};

}  // namespace pruned_ops::cuda

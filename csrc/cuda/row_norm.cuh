// One row of a sum and its LayerNorm, for add_layer_norm and embed_layer_norm.
//
// THREADS threads, a warp or a block, own a row: each keeps 32 of its numbers in registers as float,
// sums are taken over all of them, statistics in two passes over the registers. Every number is read and
// written once. Statistics are of the differences from the row's first number, which LayerNorm does not
// depend on: they are small where the row has a large mean, and 0 where it is constant, so that no rounding
// of the mean is taken for variance.
#pragma once

#include "kernels.h"
#include "ptx.cuh"

namespace pruned_ops::cuda {

constexpr int kWarp = 32;
// Threads that own an aligned row of up to 1024 numbers, one of up to kMaxHidden, and one that is not
// aligned.
constexpr int kWarpRow = kWarp;
constexpr int kMaxWarpRow = 1024;
constexpr int kBlockRow = 256;
// Rows of a block where a warp owns one.
constexpr int kRowsPerBlock = 4;

// ALIGNED: rows begin at multiples of 16 bytes and end at one, so that they are read 16 bytes a thread at
// once; otherwise number by number.
template <class T, int THREADS, bool ALIGNED>
struct Row {
  static constexpr int kNumbers = 32;
  static_assert(kNumbers * THREADS == (THREADS == kWarpRow ? kMaxWarpRow : kMaxHidden));
  static constexpr int kPerVector = 16 / sizeof(T);
  float first;             // the row's first number; every thread has it
  float values[kNumbers];  // those beyond the row's end are `first` too

  // The column of a thread's number i.
  static PRUNED_OPS_DEVICE int column(int i) {
    const int thread = thread_index() % THREADS;
    if (!ALIGNED) return i * THREADS + thread;
    return (i / kPerVector * THREADS + thread) * kPerVector + i % kPerVector;
  }

  PRUNED_OPS_DEVICE void load(Global<const T> row, int hidden) {
    first = to_float(row[0]);
    if (ALIGNED) {
#pragma unroll
      for (int i = 0; i < kNumbers; i += kPerVector) {
        Bits128 bits = {};
        if (column(i) < hidden) bits = load_128<T>(row + column(i));
        T numbers[kPerVector];
        memcpy(numbers, &bits, sizeof(bits));
#pragma unroll
        for (int j = 0; j < kPerVector; ++j) {
          values[i + j] = column(i) < hidden ? to_float(numbers[j]) : first;
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kNumbers; ++i) values[i] = first;
#pragma unroll
      for (int i = 0; i < kNumbers; ++i) {
        if (column(i) >= hidden) break;  // they rise; and so fewer loads at a time take registers
        values[i] = to_float(row[column(i)]);
      }
    }
  }

  PRUNED_OPS_DEVICE void add(Global<const T> row, int hidden) {
    Row other;
    other.load(row, hidden);
    first += other.first;
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) values[i] += other.values[i];
  }

  PRUNED_OPS_DEVICE void store(Global<T> row, int hidden) const {
    if (ALIGNED) {
#pragma unroll
      for (int i = 0; i < kNumbers; i += kPerVector) {
        T numbers[kPerVector];
#pragma unroll
        for (int j = 0; j < kPerVector; ++j) numbers[j] = from_float<T>(values[i + j]);
        Bits128 bits;
        memcpy(&bits, numbers, sizeof(bits));
        if (column(i) < hidden) store_128<T>(row + column(i), bits);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kNumbers; ++i) {
        if (column(i) < hidden) row[column(i)] = from_float<T>(values[i]);
      }
    }
  }

  // The sum over the row's threads, the same bits for each. `slot`: a place in shared memory of its own.
  static PRUNED_OPS_DEVICE float sum(float x, int slot) {
#pragma unroll
    for (int bits = kWarp / 2; bits > 0; bits /= 2) x += shuffle_xor(x, bits);
    if (THREADS == kWarp) return x;
    constexpr int kWarps = THREADS / kWarp;
    const Shared<float> sums = shared_memory<float>() + slot * kWarps;
    if (thread_index() % kWarp == 0) sums[thread_index() / kWarp] = x;
    sync_threads();
    x = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) x += sums[warp];
    return x;
  }

  // LayerNorm of the values, in place.
  PRUNED_OPS_DEVICE void normalise(Global<const T> weight, Global<const T> bias, int hidden, float eps) {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) {
      values[i] -= first;
      total += values[i];
    }
    const float mean = sum(total, 0) / static_cast<float>(hidden);
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) {
      const float difference = column(i) < hidden ? values[i] - mean : 0.0f;
      squares += difference * difference;
    }
    const float scale = 1.0f / sqrtf(sum(squares, 1) / static_cast<float>(hidden) + eps);
    Row factor, shift;
    factor.load(weight, hidden);
    shift.load(bias, hidden);
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) {
      values[i] = (values[i] - mean) * scale * factor.values[i] + shift.values[i];
    }
  }
};

// Of a block whose threads own a row together; a warp needs none.
template <int THREADS>
constexpr int row_shared_bytes() {
  return THREADS == kWarp ? 0 : 2 * (THREADS / kWarp) * static_cast<int>(sizeof(float));
}

// How a launch of `rows` rows lies: a block for each, or for kRowsPerBlock of them.
template <int THREADS>
constexpr int row_block_threads() {
  return THREADS == kWarp ? kRowsPerBlock * kWarp : THREADS;
}

// Blocks that a multiprocessor holds: 512 threads of 128 registers, so that 16 rows, or two long ones, are
// being read at a time: of 1024 half-precision numbers 64 KiB, and 25 would hide 700 ns at 4.8 TB/s on 132
// multiprocessors.
template <int THREADS>
constexpr int row_blocks() {
  return 512 / row_block_threads<THREADS>();
}

template <int THREADS>
PRUNED_OPS_DEVICE int row_index() {
  if (THREADS != kWarp) return static_cast<int>(block_index().x);
  return static_cast<int>(block_index().x) * kRowsPerBlock + thread_index() / kWarp;
}

template <int THREADS>
Grid row_grid(int rows) {
  const int each = THREADS == kWarp ? kRowsPerBlock : 1;
  return {static_cast<unsigned>((rows + each - 1) / each)};
}

}  // namespace pruned_ops::cuda

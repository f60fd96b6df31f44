// What the instructions of ptx.cuh do, but for the barriers.
#include <algorithm>

#include "launch.h"  // declares Grid and includes emulator.h

namespace pruned_ops::cuda::emulator {
namespace {

struct Copy {
  uintptr_t to;
  unsigned char bytes[16];
};

// A thread's copies under way: all, and how many of them were issued before the end of each group.
struct Copies {
  std::vector<Copy> all;
  std::vector<size_t> groups;
};
Copies copies[kMaxThreads];

}  // namespace

float shuffle_xor(float x, int bits, int line) {
  struct Lane {
    float x;
    int bits;
    float result;
  } lane{x, bits, 0.0f};
  if (bits < 0 || bits >= kLanes)
    fail("shuffle_xor by " + std::to_string(bits) + " at line " + std::to_string(line));
  if (Warp* warp = arrive(Operation::shuffle_xor, line, &lane)) {
    Lane* lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<Lane*>(warp->lanes[i]);
    for (int i = 0; i < kLanes; ++i) lanes[i]->result = lanes[i ^ lanes[i]->bits]->x;
    ++counted.shuffles;
    release(*warp);
  }
  wait();
  return lane.result;
}

void copy_async(uintptr_t to, const void* from) {
  Copy copy{to, {}};
  if (from) std::memcpy(copy.bytes, from, sizeof(copy.bytes));
  copies[current_thread].all.push_back(copy);
  // From now on until it is waited for, what is there may be the old or the new.
  std::memset(reinterpret_cast<void*>(to), 0xff, sizeof(copy.bytes));
  ++counted.async_copies;
}

void cp_async_commit() {
  Copies& own = copies[current_thread];
  own.groups.push_back(own.all.size());
}

void cp_async_wait(int pending) {
  Copies& own = copies[current_thread];
  if (static_cast<int>(own.groups.size()) <= pending) return;
  const auto end = own.groups.end() - pending;
  const size_t count = *(end - 1);
  for (size_t i = 0; i < count; ++i)
    std::memcpy(reinterpret_cast<void*>(own.all[i].to), own.all[i].bytes, sizeof(own.all[i].bytes));
  own.all.erase(own.all.begin(), own.all.begin() + count);
  own.groups.erase(own.groups.begin(), end);
  for (size_t& group : own.groups) group -= count;
}

void forget_copies(int threads) {
  for (int i = 0; i < threads; ++i) {
    copies[i].all.clear();
    copies[i].groups.clear();
  }
}

void load_matrices(const Warp& warp, bool transposed) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    const uint16_t* rows[8];
    for (int i = 0; i < 8; ++i) rows[i] = static_cast<MatrixLane*>(warp.lanes[8 * matrix + i])->row;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      const uint32_t low = transposed ? rows[column][row] : rows[row][column];
      const uint32_t high = transposed ? rows[column + 1][row] : rows[row][column + 1];
      static_cast<MatrixLane*>(warp.lanes[lane])->registers[matrix] = low | high << 16;
    }
    // 128 bytes come in one pass: different rows at the same place of them need one each.
    int rows_at[8] = {};
    for (int i = 0; i < 8; ++i)
      if (std::find(rows, rows + i, rows[i]) == rows + i)
        ++rows_at[reinterpret_cast<uintptr_t>(rows[i]) / 16 % 8];
    const int passes = *std::max_element(rows_at, rows_at + 8);
    counted.bank_conflicts += passes - 1;
  }
  ++counted.matrix_loads;
}

void gather_factors(const Warp& warp, uint16_t (&a)[16][16], uint16_t (&b)[16][8]) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto* registers = static_cast<const MultiplyLane*>(warp.lanes[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i)
      std::memcpy(&a[group + 8 * (i % 2)][pair + 8 * (i / 2)], &registers->a[i], sizeof(uint32_t));
    for (int i = 0; i < 2; ++i)
      for (int half = 0; half < 2; ++half)
        b[pair + 8 * i + half][group] = static_cast<uint16_t>(registers->b[i] >> 16 * half);
  }
}

void multiply(const Warp& warp, const float (&a)[16][16], const float (&b)[16][8]) {
  float sums[16][8] = {};
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 8; ++j) sums[i][j] += a[i][k] * b[k][j];
  for (int lane = 0; lane < kLanes; ++lane) {
    float* d = static_cast<MultiplyLane*>(warp.lanes[lane])->d;
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) d[i] += sums[group + 8 * (i / 2)][pair + i % 2];
  }
  ++counted.multiplications;
}

}  // namespace pruned_ops::cuda::emulator

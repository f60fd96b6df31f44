// Rotates the heads of a row of q|k|v in place: in each head, channels i and i + head_dim / 2 are the two
// coordinates that turn by the angle whose cosine and sine are number i of theirs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/multiply_kernel.h"

namespace pruned_ops::CPU_CAPABILITY {

inline void rotate_row(float* row, int64_t heads, int64_t head_dim, const float* cos_sin) {
  const int64_t half = head_dim / 2;
  for (int64_t head = 0; head < heads; ++head, row += head_dim) {
    for (int64_t i = 0; i < half; i += kLanes) {
      const int64_t lanes = std::min(half - i, kLanes);
      const Vec cos = Vec::loadu(cos_sin + i, lanes), sin = Vec::loadu(cos_sin + half + i, lanes);
      const Vec first = Vec::loadu(row + i, lanes), second = Vec::loadu(row + half + i, lanes);
      (first * cos - second * sin).store(row + i, static_cast<int>(lanes));
      (second * cos + first * sin).store(row + half + i, static_cast<int>(lanes));
    }
  }
}

}  // namespace pruned_ops::CPU_CAPABILITY

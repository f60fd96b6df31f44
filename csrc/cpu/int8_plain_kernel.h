// int8 in plain C++, for every processor: right, and slower than fp32. Values of x are bytes as they are,
// nothing is added to them, and the panel's start values are passed over.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/multiply_kernel.h"

namespace pruned_ops::CPU_CAPABILITY {

constexpr int kNarrowRows = kRegisterRows;  // of a tile
constexpr int64_t kQuantizedBytes = 1;      // of a value of x
constexpr int64_t kTailBytes = 0;           // after a row

// The largest magnitude of a row; not a number where one of its values is none.
inline float top_of(const float* x, int64_t in) {
  float top = 0.0f;
  for (int64_t i = 0; i < in; ++i) {
    const float size = std::abs(x[i]);
    if (std::isnan(size)) return size;
    top = std::max(top, size);
  }
  return top;
}

// Quantises a row whose largest magnitude is `top`; returns its scale.
inline float quantize_row(const float* x, int64_t in, float top, uint8_t* bytes) {
  const float inverse = quantizing_factor(top);
  for (int64_t i = 0; i < in; ++i) {
    // Where the row holds an infinity or what is not a number, its scale says so.
    const float rounded = std::nearbyint(x[i] * inverse);
    bytes[i] = static_cast<uint8_t>(std::abs(rounded) <= 127.0f ? static_cast<int8_t>(rounded) : 0);
  }
  std::fill(bytes + in, bytes + round_up(in, kInt8Group), uint8_t{0});
  return top / 127.0f;
}

// sums (kRows, 32) = x times the panel. All 32 channels cost what one does.
template <int kRows>
void multiply_int8(const uint8_t* x, int64_t x_stride, const int8_t* panel, int64_t steps, int64_t,
                   Ahead ahead, int32_t* sums) {
  std::fill(sums, sums + kRows * kWeightPanel, 0);
  for (int64_t step = 0; step < steps; ++step) {
    panel += kStepBytes;
    fetch(ahead, step);
    for (int row = 0; row < kRows; ++row) {
      const int8_t* four = reinterpret_cast<const int8_t*>(x + row * x_stride + step * kInt8Group);
      int32_t* to = sums + row * kWeightPanel;
      for (int64_t channel = 0; channel < kWeightPanel; ++channel) {
        const int8_t* weights = panel + channel * kInt8Group;
        to[channel] +=
            four[0] * weights[0] + four[1] * weights[1] + four[2] * weights[2] + four[3] * weights[3];
      }
    }
  }
}

// The sums of kLanes channels, as floats.
inline Vec as_floats(const int32_t* sums) {
  alignas(64) float values[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) values[lane] = static_cast<float>(sums[lane]);
  return Vec::loadu(values);
}

}  // namespace pruned_ops::CPU_CAPABILITY

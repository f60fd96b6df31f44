// int8 by AMX, which multiplies signed bytes by signed ones: nothing is added to the activations, and the
// panel's start values are passed over.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/amx_tiles.h"
#include "cpu/int8_avx512_rows.h"
#include "cpu/kernels.h"

namespace pruned_ops::CPU_CAPABILITY {

constexpr int64_t kQuantizedBytes = 1;  // of a value of x
constexpr int64_t kTailBytes = 0;       // after a row

inline float quantize_row(const float* x, int64_t in, float top, uint8_t* bytes) {
  return quantize_row_adding<0>(x, in, top, bytes);
}

struct Int8Product {
  static void add0() { _tile_dpbssd(0, 4, 6); }
  static void add1() { _tile_dpbssd(1, 4, 7); }
  static void add2() { _tile_dpbssd(2, 5, 6); }
  static void add3() { _tile_dpbssd(3, 5, 7); }
};

template <typename Visit>
void for_each_int8_block(const Int8LinearArgs& args, const NarrowRows& x, int64_t rows, const Visit& visit) {
  for_each_amx_block<Int8Product, int32_t>(args.panels, kStepBytes, args.in, args.out, x, rows, visit);
}

}  // namespace pruned_ops::CPU_CAPABILITY

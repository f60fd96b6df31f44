// GELU, x Phi(x) in float: relu(x) - |x| / 2 erfc(|x| / sqrt 2).
//
// erfc is from Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: a polynomial in t times
// exp(-x^2 / 2). The largest error is 3.3e-7, and erff takes twice as many instructions and more registers.
// A header of its own for the test that calls it number by number.
#pragma once

#include "ptx.cuh"

namespace pruned_ops::cuda {

PRUNED_OPS_DEVICE float gelu(float x) {
  // From 16 on the power is 0, and an infinity has its limit.
  const float size = min_or_nan(fabsf(x), 16.0f);
  const float t = reciprocal_approx(1.0f + 0.23164189f * size);
  float series = 0.5307027f * t - 0.7265760f;
  series = series * t + 0.7107069f;
  series = series * t - 0.1422484f;
  series = series * t + 0.1274148f;
  const float scaled = 0.84932180f * size;  // sqrt(log2(e) / 2)
  return fmaxf(x, 0.0f) - size * exp2_approx(-scaled * scaled) * (series * t);
}

}  // namespace pruned_ops::cuda

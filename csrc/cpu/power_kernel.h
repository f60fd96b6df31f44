// 2^x for x <= 0; exactly 0 for x <= -126. Adding a number whose last bit is worth 1 rounds x to a whole
// number, which becomes the exponent; the rest of x goes through a polynomial (minimax for the relative error
// on [-1/2, 1/2], fitted by iterated weighted least squares). Largest relative error 2.2e-7.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>

namespace pruned_ops::CPU_CAPABILITY {

inline at::vec::Vectorized<float> power_of_two(const at::vec::Vectorized<float>& x) {
  using Vec = at::vec::Vectorized<float>;
  using Bits = at::vec::Vectorized<int32_t>;
  constexpr float kCoefficients[] = {1.327647245e-03f, 9.675541893e-03f, 5.550713092e-02f,
                                     2.402212024e-01f, 6.931469440e-01f, 1.000000119e+00f};
  // Below this the exponent field would run out. What the lines below make of it, 2^-126 and the polynomial's
  // error, is subtracted at the end, so that all that is less becomes 0; other powers lose nothing by it.
  constexpr float kLeast = -126.0f;
  constexpr float kOfLeast = 0x1p-126f * kCoefficients[5];
  constexpr float kRounds = 12582912.0f;  // 1.5 * 2^23: its bits shifted left by 23 are 0
  const Vec bounded = at::vec::clamp_min(x, Vec(kLeast));
  const Vec shifted = bounded + Vec(kRounds);
  const Vec rest = bounded - (shifted - Vec(kRounds));
  Vec sum(kCoefficients[0]);
#pragma GCC unroll 8
  for (int i = 1; i < 6; ++i) sum = at::vec::fmadd(sum, rest, Vec(kCoefficients[i]));
  const Bits exponent = at::vec::cast<int32_t>(shifted) << Bits(23);
  return at::vec::cast<float>(at::vec::cast<int32_t>(sum) + exponent) - Vec(kOfLeast);
}

}  // namespace pruned_ops::CPU_CAPABILITY

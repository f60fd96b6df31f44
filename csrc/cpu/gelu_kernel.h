// The exact (erf) GELU, x * Phi(x), without a division or an exponential.
// Phi(x) - 1/2 is odd: x times a polynomial in x^2, for |x| up to kLimit, where Phi is 0 or 1 to fp32.
// The polynomial is minimax for the error of x * Phi(x) (fitted by iterated weighted least squares) and
// written in t = 2 (x / kLimit)^2 - 1: in powers of x^2 its terms would cancel. Largest error 1.2e-6, near
// |x| = 4.7; 1.5e-6 of the value near 0.
#pragma once

#include <ATen/cpu/vec/vec.h>

namespace pruned_ops::CPU_CAPABILITY {

inline at::vec::Vectorized<float> gelu(const at::vec::Vectorized<float>& x) {
  using Vec = at::vec::Vectorized<float>;
  constexpr float kLimit = 5.2f;
  constexpr float kCoefficients[] = {8.587780176e-04f, -2.503721975e-03f, 2.853581915e-03f, -3.505704924e-03f,
                                     7.557858247e-03f, -1.310335007e-02f, 1.838715188e-02f, -2.459340356e-02f,
                                     3.190726414e-02f, -3.994129971e-02f, 5.003016815e-02f, -6.774340570e-02f,
                                     1.359499395e-01f};
  const Vec near = at::vec::clamp(x, Vec(-kLimit), Vec(kLimit));
  const Vec t = at::vec::fmadd(near * near, Vec(2.0f / (kLimit * kLimit)), Vec(-1.0f));
  Vec sum(kCoefficients[0]);
#pragma GCC unroll 16
  for (int i = 1; i < 13; ++i) sum = at::vec::fmadd(sum, t, Vec(kCoefficients[i]));
  // Clamped: what rounding leaves of Phi beyond the limits would be multiplied by any x.
  const Vec phi = at::vec::clamp(at::vec::fmadd(near, sum, Vec(0.5f)), Vec(0.0f), Vec(1.0f));
  return x * phi;
}

// The same to an error of 1.7e-4, for values that are then quantised: 1% of the step between two int8 values
// where the row's largest is 2.1. A polynomial in x^2 with half the terms, which is 0.5 / kLimit at the
// limit, so that Phi needs no clamp.
inline at::vec::Vectorized<float> gelu_for_int8(const at::vec::Vectorized<float>& x) {
  using Vec = at::vec::Vectorized<float>;
  constexpr float kLimit = 3.95f;
  constexpr float kCoefficients[] = {2.443576896e-08f, -1.681151957e-06f, 4.955193072e-05f, -8.290392580e-04f,
                                     8.842917159e-03f, -6.472274661e-02f, 3.979866803e-01f};
  const Vec near = at::vec::clamp(x, Vec(-kLimit), Vec(kLimit));
  const Vec square = near * near;
  Vec sum(kCoefficients[0]);
#pragma GCC unroll 16
  for (int i = 1; i < 7; ++i) sum = at::vec::fmadd(sum, square, Vec(kCoefficients[i]));
  return x * at::vec::fmadd(near, sum, Vec(0.5f));
}

}  // namespace pruned_ops::CPU_CAPABILITY

// LayerNorm(first + second + third) of one row, and the sum of rows alone. A call owns a row, keeps the sum
// of the inputs in the output row, which stays in L1, and writes that row: once with the sum, less its first
// number, once normalised. Two passes, mean and then variance of the difference: a one-pass variance cancels.
// The sum's first number is subtracted, which LayerNorm does not depend on: what is left is small where the
// row has a large mean, and 0 where the row is constant, so that no rounding of the mean is taken for
// variance.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cmath>
#include <cstdint>

#include "cpu/kernels.h"

namespace pruned_ops::CPU_CAPABILITY {

// Calls visit(column, lanes) for whole vectors and then for what is left of the row.
template <typename Visit>
inline void for_each_vector(int64_t columns, const Visit& visit) {
  constexpr int64_t kStep = at::vec::Vectorized<float>::size();
  int64_t column = 0;
  for (; column + kStep <= columns; column += kStep) visit(column, kStep);
  if (column < columns) visit(column, columns - column);
}

inline void add_row(int64_t numbers, const float* first, const float* second, const float* third,
                    float* out) {
  using Row = at::vec::Vectorized<float>;
  for_each_vector(numbers, [&](int64_t column, int64_t lanes) {
    const Row sum = Row::loadu(first + column, lanes) + Row::loadu(second + column, lanes);
    (sum + Row::loadu(third + column, lanes)).store(out + column, static_cast<int>(lanes));
  });
}

inline void layer_norm_row(const LayerNormArgs& args, const float* first, const float* second,
                           const float* third, float* out) {
  using Row = at::vec::Vectorized<float>;
  const auto plus = [](Row& x, Row& y) { return x + y; };
  const float count = static_cast<float>(args.hidden);

  const float second_number = second != nullptr ? first[0] + second[0] : first[0];
  const Row pivot(third != nullptr ? second_number + third[0] : second_number);
  Row sum(0.0f);
  for_each_vector(args.hidden, [&](int64_t column, int64_t lanes) {
    Row value = Row::loadu(first + column, lanes);
    if (second != nullptr) value = value + Row::loadu(second + column, lanes);
    if (third != nullptr) value = value + Row::loadu(third + column, lanes);
    const Row difference = value - pivot;
    difference.store(out + column, lanes);
    sum = sum + Row::set(Row(0.0f), difference, lanes);
  });
  const Row mean(at::vec::vec_reduce_all<float>(plus, sum) / count);

  Row squares(0.0f);
  for_each_vector(args.hidden, [&](int64_t column, int64_t lanes) {
    const Row difference = Row::set(Row(0.0f), Row::loadu(out + column, lanes) - mean, lanes);
    squares = at::vec::fmadd(difference, difference, squares);
  });
  const float variance = at::vec::vec_reduce_all<float>(plus, squares) / count;

  const Row inverse(1.0f / std::sqrt(variance + args.eps));
  for_each_vector(args.hidden, [&](int64_t column, int64_t lanes) {
    const Row normalized = (Row::loadu(out + column, lanes) - mean) * inverse;
    const Row weight = Row::loadu(args.weight + column, lanes);
    const Row bias = Row::loadu(args.bias + column, lanes);
    at::vec::fmadd(normalized, weight, bias).store(out + column, lanes);
  });
}

}  // namespace pruned_ops::CPU_CAPABILITY

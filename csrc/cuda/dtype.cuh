// The numbers that kernels read and write, and the step from a dtype that is known when the program runs to a
// type that is known when it is compiled.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace pruned_ops::cuda {

// 16-bit numbers as they lie in memory. Kernels compute in float.
struct half {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

// A type as a value.
template <class T>
struct TypeOf {
  using type = T;
};

// Calls start(TypeOf<T>()) for the type that this dtype stands for, and returns what it returns. This one is
// for kernels that multiply matrices: tensor cores do not take float.
template <class Start>
const char* visit_half(Dtype dtype, const Start& start) {
  switch (dtype) {
    case Dtype::float16:
      return start(TypeOf<half>());
    case Dtype::bfloat16:
      return start(TypeOf<bfloat16>());
    default:
      return "the dtype is neither float16 nor bfloat16";
  }
}

// The same for kernels that take float too.
template <class Start>
const char* visit(Dtype dtype, const Start& start) {
  return dtype == Dtype::float32 ? start(TypeOf<float>()) : visit_half(dtype, start);
}

}  // namespace pruned_ops::cuda

#pragma once

namespace pruned_ops {

// Bits of edx in leaf 7 of cpuid.
constexpr int kAmxBf16Bit = 22;
constexpr int kAmxInt8Bit = 25;

// Whether the processor has AMX with this of its products, and Linux lets this process use it, which is asked
// for here. No where ATEN_CPU_CAPABILITY asks for avx512 and so for less.
bool may_use_amx(int product_bit);

}  // namespace pruned_ops

// Compiled by setup.py for AVX-512 with AVX512_BF16, with CPU_CAPABILITY set to AVX512_BF16, so that the
// linker takes no inline function in here for one of another copy.
#include "cpu/attention_bf16_kernel.h"
#include "cpu/bf16_linear_kernel.h"

namespace pruned_ops::CPU_CAPABILITY {

extern const Bf16Kernels bf16_table;
const Bf16Kernels bf16_table = {
    "AVX512_BF16", round_rows, bf16_linear, bf16_linear_bf16, {attention_bf16_scratch, attention_bf16}};

}  // namespace pruned_ops::CPU_CAPABILITY

// Compiled by setup.py for AVX-512 with AVX512_BF16 and for AMX, each time with CPU_CAPABILITY set to its
// name, AVX512_BF16 or AMX_BF16, so that the linker takes no inline function in here for one of another copy.
#include "cpu/bf16_linear_kernel.h"
#if defined(__AMX_BF16__)
#include "cpu/attention_amx_kernel.h"
#else
#include "cpu/attention_bf16_kernel.h"
#endif

#define PRUNED_OPS_STRING_OF(name) #name
#define PRUNED_OPS_STRING(name) PRUNED_OPS_STRING_OF(name)

namespace pruned_ops::CPU_CAPABILITY {

#if defined(__AMX_BF16__)
constexpr AttentionKernel kBf16Attention = {attention_amx_scratch, attention_amx};
#else
constexpr AttentionKernel kBf16Attention = {attention_bf16_scratch, attention_bf16};
#endif

extern const Bf16Kernels bf16_table;
const Bf16Kernels bf16_table = {PRUNED_OPS_STRING(CPU_CAPABILITY),
                                kBf16ChunkRows,
                                round_rows,
                                bf16_linear,
                                bf16_linear_bf16,
                                kBf16Attention,
                                rotate_row_bf16};

}  // namespace pruned_ops::CPU_CAPABILITY

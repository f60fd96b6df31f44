// Compiled by setup.py for plain C++, for AVX2, for AVX-512 with VNNI and for AMX, or for plain C++ and ARM's
// two products of bytes, each time with those flags and CPU_CAPABILITY set to its name. Names that ATen has
// not, such as AVX512_VNNI, keep the linker from taking an inline function in here for one of another copy.
#include "cpu/int8_linear_kernel.h"

#define PRUNED_OPS_STRING_OF(name) #name
#define PRUNED_OPS_STRING(name) PRUNED_OPS_STRING_OF(name)

namespace pruned_ops::CPU_CAPABILITY {

extern const Int8Kernels int8_table;
const Int8Kernels int8_table = {PRUNED_OPS_STRING(CPU_CAPABILITY),
                                kInt8ChunkRows,
                                kQuantizedBytes,
                                kTailBytes,
                                quantize_rows,
                                int8_linear,
                                int8_linear_gelu,
                                kInt8LinearBf16};

}  // namespace pruned_ops::CPU_CAPABILITY

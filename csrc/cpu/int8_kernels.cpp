// Compiled once, for AVX-512 with VNNI. CPU_CAPABILITY is AVX512_VNNI, so that the linker takes no inline
// function in here for one of another copy.
#include "cpu/int8_linear_kernel.h"

namespace pruned_ops::CPU_CAPABILITY {

extern const Int8Kernels table;
const Int8Kernels table = {quantize_rows, int8_linear};

}  // namespace pruned_ops::CPU_CAPABILITY

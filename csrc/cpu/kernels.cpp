// Compiled once per capability by setup.py, with that capability's flags and CPU_CAPABILITY set to its name.
// Everything below lives in a namespace of that name, so the copies never collide.
#include "cpu/kernels.h"

#include "cpu/attention_kernel.h"
#include "cpu/layer_norm_kernel.h"
#include "cpu/linear_kernel.h"
#include "cpu/rotary_kernel.h"

#define PRUNED_OPS_STRING_OF(name) #name
#define PRUNED_OPS_STRING(name) PRUNED_OPS_STRING_OF(name)

namespace pruned_ops::CPU_CAPABILITY {

extern const Kernels table;
const Kernels table = {PRUNED_OPS_STRING(CPU_CAPABILITY),
                       {attention_scratch, attention},
                       linear,
                       layer_norm_row,
                       add_row,
                       rotate_row};

}  // namespace pruned_ops::CPU_CAPABILITY

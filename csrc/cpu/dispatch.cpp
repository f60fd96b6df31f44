#include <ATen/Version.h>

#include <string>

#include "cpu/amx_permission.h"
#include "cpu/arm_features.h"
#include "cpu/kernels.h"

namespace pruned_ops {

// setup.py defines PRUNED_OPS_HAVE_<capability> for each copy of the kernels that it compiles beside DEFAULT.
namespace DEFAULT {
extern const Kernels table;
extern const Int8Kernels int8_table;
}  // namespace DEFAULT
#ifdef PRUNED_OPS_HAVE_AVX2
namespace AVX2 {
extern const Kernels table;
extern const Int8Kernels int8_table;
}  // namespace AVX2
#endif
#ifdef PRUNED_OPS_HAVE_AVX512
namespace AVX512 {
extern const Kernels table;
}
#endif
#ifdef PRUNED_OPS_HAVE_AVX512_VNNI
namespace AVX512_VNNI {
extern const Int8Kernels int8_table;
}
#endif
#ifdef PRUNED_OPS_HAVE_AMX_INT8
namespace AMX_INT8 {
extern const Int8Kernels int8_table;
}
#endif
#ifdef PRUNED_OPS_HAVE_NEON_DOTPROD
namespace NEON_DOTPROD {
extern const Int8Kernels int8_table;
}
#endif
#ifdef PRUNED_OPS_HAVE_NEON_I8MM
namespace NEON_I8MM {
extern const Int8Kernels int8_table;
}
#endif
#ifdef PRUNED_OPS_HAVE_AVX512_BF16
namespace AVX512_BF16 {
extern const Bf16Kernels bf16_table;
}
#endif
#ifdef PRUNED_OPS_HAVE_AMX_BF16
namespace AMX_BF16 {
extern const Bf16Kernels bf16_table;
}
#endif

namespace {

const Kernels& choose() {
  // ATen has already asked the processor, the operating system and ATEN_CPU_CAPABILITY.
  const std::string capability = at::get_cpu_capability();
#ifdef PRUNED_OPS_HAVE_AVX512
  if (capability == "AVX512") return AVX512::table;
#endif
#ifdef PRUNED_OPS_HAVE_AVX2
  if (capability == "AVX512" || capability == "AVX2") return AVX2::table;
#endif
  return DEFAULT::table;
}

const Int8Kernels& choose_int8() {
  const std::string capability = at::get_cpu_capability();
#ifdef PRUNED_OPS_HAVE_AMX_INT8
  if (capability == "AVX512" && may_use_amx(kAmxInt8Bit)) return AMX_INT8::int8_table;
#endif
#ifdef PRUNED_OPS_HAVE_AVX512_VNNI
  __builtin_cpu_init();
  if (capability == "AVX512" && __builtin_cpu_supports("avx512vnni")) return AVX512_VNNI::int8_table;
#endif
#ifdef PRUNED_OPS_HAVE_AVX2
  if (capability == "AVX512" || capability == "AVX2") return AVX2::int8_table;
#endif
#ifdef PRUNED_OPS_HAVE_NEON_I8MM
  if (usable_arm_features().i8mm) return NEON_I8MM::int8_table;
#endif
#ifdef PRUNED_OPS_HAVE_NEON_DOTPROD
  if (usable_arm_features().dotprod) return NEON_DOTPROD::int8_table;
#endif
  return DEFAULT::int8_table;
}

const Bf16Kernels* choose_bf16() {
#ifdef PRUNED_OPS_HAVE_AVX512_BF16
  __builtin_cpu_init();
  if (at::get_cpu_capability() != "AVX512" || !__builtin_cpu_supports("avx512bf16")) return nullptr;
#ifdef PRUNED_OPS_HAVE_AMX_BF16
  if (may_use_amx(kAmxBf16Bit)) return &AMX_BF16::bf16_table;
#endif
  return &AVX512_BF16::bf16_table;
#else
  return nullptr;
#endif
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const Int8Kernels& int8_kernels() {
  static const Int8Kernels& chosen = choose_int8();
  return chosen;
}

const Bf16Kernels* bf16_kernels() {
  static const Bf16Kernels* const chosen = choose_bf16();
  return chosen;
}

}  // namespace pruned_ops

// Which of ARM's products of bytes this processor has, as Linux says; on other systems none of them. ATen
// asks ARM processors for SVE alone.
#pragma once

#if defined(__aarch64__) && defined(__linux__)
#define PRUNED_OPS_ASKS_LINUX
#include <sys/auxv.h>
#endif

#include <cstdlib>
#include <cstring>

namespace pruned_ops {

struct ArmFeatures {
  bool dotprod = false;  // SDOT, of ARMv8.2
  bool i8mm = false;     // SMMLA, of ARMv8.6
};

inline ArmFeatures arm_features() {
#ifdef PRUNED_OPS_ASKS_LINUX
  // As in Linux's asm/hwcap.h; older C libraries do not know the second.
  constexpr unsigned long kDotprod = 1ul << 20;  // HWCAP_ASIMDDP
  constexpr unsigned long kI8mm = 1ul << 13;     // HWCAP2_I8MM
  return {(getauxval(AT_HWCAP) & kDotprod) != 0, (getauxval(AT_HWCAP2) & kI8mm) != 0};
#else
  return {};
#endif
}

// The same; none of them where ATEN_CPU_CAPABILITY asks for default.
inline ArmFeatures usable_arm_features() {
  const char* const asked = std::getenv("ATEN_CPU_CAPABILITY");
  return asked != nullptr && std::strcmp(asked, "default") == 0 ? ArmFeatures{} : arm_features();
}

}  // namespace pruned_ops

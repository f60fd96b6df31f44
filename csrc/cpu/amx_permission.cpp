#include "cpu/amx_permission.h"

#ifdef __x86_64__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>

namespace pruned_ops {

#ifdef __x86_64__
namespace {

// Tiles make the state of a thread, which Linux saves at every switch, eight times as large, so it gives them
// only to processes that ask. It refuses where it is older than 5.16 or a thread's stack for signals could
// not hold them.
bool ask_linux() {
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h
  constexpr long kTiles = 18;                  // the state's number
  return syscall(SYS_arch_prctl, kRequestPermission, kTiles) == 0;
}

}  // namespace
#endif

bool may_use_amx([[maybe_unused]] int product_bit) {
#ifdef __x86_64__
  constexpr int kTilesBit = 24;
  const char* const asked = std::getenv("ATEN_CPU_CAPABILITY");
  if (asked != nullptr && std::strcmp(asked, "avx512") == 0) return false;
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  if ((edx >> kTilesBit & edx >> product_bit & 1) == 0) return false;
  static const bool allowed = ask_linux();
  return allowed;
#else
  return false;
#endif
}

}  // namespace pruned_ops

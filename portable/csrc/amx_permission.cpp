#include "amx_permission.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace nvtripy_portable {

#if defined(__x86_64__) && defined(__linux__)
namespace {

bool has_amx() {
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBf16 | kTile | kInt8;
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAll) == kAll;
}

// Linux gives a program the registers when it asks for them, because they make its signal frames larger; it refuses where some
// thread's alternative signal stack is too small for that, and older kernels do not know the question.
bool is_permitted() {
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

}  // namespace

bool may_use_amx() {
    static const bool may = has_amx() && is_permitted();
    return may;
}
#else
bool may_use_amx() { return false; }
#endif

}  // namespace nvtripy_portable

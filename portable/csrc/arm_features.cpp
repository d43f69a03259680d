#include "arm_features.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace nvtripy_portable {

#if defined(__aarch64__) && defined(__linux__)
// The bits as Linux' arch/arm64/include/uapi/asm/hwcap.h has them: HWCAP_ASIMDDP and, in the second word, HWCAP2_I8MM.
bool has_arm_feature(ArmFeature feature) {
    return feature == ArmFeature::dotprod ? getauxval(AT_HWCAP) >> 20 & 1 : getauxval(AT_HWCAP2) >> 13 & 1;
}
#elif defined(__aarch64__) && defined(__APPLE__)
bool has_arm_feature(ArmFeature feature) {
    int has = 0;
    size_t size = sizeof has;
    const char* name = feature == ArmFeature::dotprod ? "hw.optional.arm.FEAT_DotProd" : "hw.optional.arm.FEAT_I8MM";
    return sysctlbyname(name, &has, &size, nullptr, 0) == 0 && has != 0;
}
#else
bool has_arm_feature(ArmFeature) { return false; }
#endif

}  // namespace nvtripy_portable

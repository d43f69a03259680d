#include "isa.h"

#include <stdexcept>

#include "amx_permission.h"
#include "arm_features.h"

namespace nvtripy_portable {

namespace {

struct Choice {
    const char* name;
    const Kernels* kernels;
    bool (*is_supported)();
    bool by_name_only = false;
};

#if defined(NVTRIPY_PORTABLE_X86)
bool has_avx512() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("f16c");
}
#endif

const Choice kChoices[] = {
#if defined(NVTRIPY_PORTABLE_X86)
#if defined(NVTRIPY_PORTABLE_AMX)
    {"amx", &amx::kernels, [] { return has_avx512() && may_use_amx(); }},
#endif
#if defined(NVTRIPY_PORTABLE_AMX)
    {"amx-batch", &amx::batch_kernels, [] { return has_avx512() && may_use_amx(); }, true},
#endif
    {"avx512", &avx512::kernels, has_avx512},
    {"avx2", &avx2::kernels,
     [] {
         __builtin_cpu_init();
         return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
     }},
#endif
#if defined(NVTRIPY_PORTABLE_ARM)
#if defined(NVTRIPY_PORTABLE_I8MM)
    {"i8mm", &i8mm::kernels, [] { return has_arm_feature(ArmFeature::dotprod) && has_arm_feature(ArmFeature::i8mm); }},
#endif
    {"dotprod", &dotprod::kernels, [] { return has_arm_feature(ArmFeature::dotprod); }},
    {"neon", &neon::kernels, [] { return true; }},
#endif
    {"portable", &portable::kernels, [] { return true; }},
    {"amx-emulated", &amx_emulated::kernels, [] { return true; }, true},
};

std::vector<std::string> supported(bool named_too) {
    std::vector<std::string> names;
    for (const Choice& choice : kChoices)
        if ((named_too || !choice.by_name_only) && choice.is_supported()) names.push_back(choice.name);
    return names;
}

}  // namespace

std::vector<std::string> available_isas() { return supported(false); }
std::vector<std::string> testable_isas() { return supported(true); }

const Kernels& kernels_for(const std::string& name) {
    std::string known;
    for (const Choice& choice : kChoices) {
        if ((name.empty() ? !choice.by_name_only : name == choice.name) && choice.is_supported()) return *choice.kernels;
        if (name == choice.name)
            throw std::invalid_argument("NVTRIPY_PORTABLE_ISA asks for " + name + ", which this CPU does not have");
        known += (known.empty() ? "" : ", ") + std::string(choice.name);
    }
    throw std::invalid_argument("expected NVTRIPY_PORTABLE_ISA to be one of " + known + " but got '" + name + "'");
}

}  // namespace nvtripy_portable

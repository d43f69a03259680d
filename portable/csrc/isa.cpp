#include "isa.h"

#include <stdexcept>

namespace nvtripy_portable {

namespace {

struct Choice {
    const char* name;
    const Kernels* kernels;
    bool (*is_supported)();
};

const Choice kChoices[] = {
#if defined(NVTRIPY_PORTABLE_X86)
    {"avx512", &avx512::kernels,
     [] {
         __builtin_cpu_init();
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("f16c");
     }},
    {"avx2", &avx2::kernels,
     [] {
         __builtin_cpu_init();
         return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
     }},
#endif
    {"portable", &portable::kernels, [] { return true; }},
};

}  // namespace

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Choice& choice : kChoices)
        if (choice.is_supported()) names.push_back(choice.name);
    return names;
}

const Kernels& kernels_for(const std::string& name) {
    std::string known;
    for (const Choice& choice : kChoices) {
        if ((name.empty() || name == choice.name) && choice.is_supported()) return *choice.kernels;
        if (name == choice.name)
            throw std::invalid_argument("NVTRIPY_PORTABLE_ISA asks for " + name + ", which this CPU does not have");
        known += (known.empty() ? "" : ", ") + std::string(choice.name);
    }
    throw std::invalid_argument("expected NVTRIPY_PORTABLE_ISA to be one of " + known + " but got '" + name + "'");
}

}  // namespace nvtripy_portable

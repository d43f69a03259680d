// What there is to choose from for `streaming`, and what a choice can go by: the processor's name and a measurement. Who
// chooses is nvtripy_portable/cpu/tuning.py.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"
#include "streaming.h"

namespace nvtripy_portable {

// As CPUID tells: "GenuineIntel", "AuthenticAMD", ...; empty and 0 on processors that have no such instruction, but for the
// name, which macOS tells.
struct Processor {
    std::string vendor;
    int family = 0;
    int model = 0;
    std::string name;
};

Processor this_processor();

// A policy as people write it: "t0", "nta:4096" or "none". Throws std::invalid_argument, which names `who` as the asker.
Streaming streaming_of(const std::string& text, const char* who);
std::string text_of(const Streaming& policy);

// Both wait until no kernel is at work.
Streaming current_streaming();
void set_streaming(const Streaming& policy);

struct Bytes {
    const uint8_t* data = nullptr;
    int64_t count = 0;
};

// Seconds that each policy took in each round, policy by policy, to read `memory` (some of it, then the next, so that it
// has left the caches when it comes round again, if it is larger than they are) on all threads of the pool, through the
// products of float16 and of int8 weights with one token, whatever its bytes mean. The policies take turns, so that whatever
// else the machine does meets all of them. Throws std::invalid_argument where no piece of memory is 64 KB long.
std::vector<std::vector<double>> time_streaming(const Kernels& kernels, const std::vector<Streaming>& policies,
                                                int rounds, const std::vector<Bytes>& memory);

}  // namespace nvtripy_portable

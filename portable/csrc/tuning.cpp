#include "tuning.h"

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstring>
#include <map>
#include <stdexcept>
#include <utility>

#include "thread_pool.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace nvtripy_portable {

Streaming streaming;

namespace {

constexpr std::pair<const char*, Hint> kHints[] = {
    {"t0", Hint::t0}, {"t1", Hint::t1}, {"nta", Hint::nta}, {"none", Hint::none}};
constexpr int64_t kLeastAhead = 64, kMostAhead = 1 << 20;

// One unit of the measurement: rows of 8192 bytes, some tens of KB together, as a decoding step's units are.
constexpr int64_t kRowBytes = 8192, kUnitRows = 8, kUnit = kRowBytes * kUnitRows;
constexpr int64_t kUnitsPerThread = 32;  // of one measurement: 2 MB, some hundred microseconds

}  // namespace

void ask_for_first(const void* p) {
    const auto* bytes = static_cast<const char*>(p);
    const Streaming policy = streaming;
    for (int64_t i = 0; i < policy.bytes_ahead; i += 64) switch (policy.hint) {
            case Hint::t0: __builtin_prefetch(bytes + i, 0, 3); break;
            case Hint::t1: __builtin_prefetch(bytes + i, 0, 2); break;
            case Hint::nta: __builtin_prefetch(bytes + i, 0, 0); break;
            case Hint::none: return;
        }
}

Processor this_processor() {
    Processor result;
#if defined(__x86_64__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    char text[48];
    if (__get_cpuid(0, &a, &b, &c, &d)) {
        const unsigned words[] = {b, d, c};
        std::memcpy(text, words, sizeof words);
        result.vendor.assign(text, sizeof words);
    }
    if (__get_cpuid(1, &a, &b, &c, &d)) {
        const int family = a >> 8 & 15, model = a >> 4 & 15;
        result.family = family + (family == 15 ? static_cast<int>(a >> 20 & 255) : 0);
        result.model = model + (family == 15 || family == 6 ? static_cast<int>(a >> 16 & 15) << 4 : 0);
    }
    for (unsigned leaf = 0; leaf < 3; ++leaf) {
        unsigned words[4];
        if (!__get_cpuid(0x80000002 + leaf, &words[0], &words[1], &words[2], &words[3])) return result;
        std::memcpy(text + 16 * leaf, words, sizeof words);
    }
    result.name.assign(text, std::find(text, text + sizeof text, '\0'));
    result.name.erase(result.name.find_last_not_of(' ') + 1);
    result.name.erase(0, result.name.find_first_not_of(' '));
#elif defined(__APPLE__)
    char text[64] = {};
    size_t size = sizeof text - 1;
    if (sysctlbyname("machdep.cpu.brand_string", text, &size, nullptr, 0) == 0) result.name = text;
#endif
    return result;
}

Streaming streaming_of(const std::string& text, const char* who) {
    const size_t colon = text.find(':');
    const std::string name = text.substr(0, colon);
    for (const auto& [known, hint] : kHints) {
        if (name != known) continue;
        Streaming result;
        result.hint = hint;
        if (colon == std::string::npos) return result;
        const char *begin = text.data() + colon + 1, *end = text.data() + text.size();
        const auto [last, error] = std::from_chars(begin, end, result.bytes_ahead);
        if (hint == Hint::none || error != std::errc{} || last != end || result.bytes_ahead < kLeastAhead ||
            result.bytes_ahead > kMostAhead)
            break;
        return result;
    }
    throw std::invalid_argument("expected " + std::string(who) + " to be t0, t1 or nta, with " +
                                std::to_string(kLeastAhead) + " to " + std::to_string(kMostAhead) +
                                " bytes ahead after a colon (nta:4096) or without, or none, but got '" + text + "'");
}

std::string text_of(const Streaming& policy) {
    std::string text;
    for (const auto& [name, hint] : kHints)
        if (hint == policy.hint) text = name;
    return policy.hint == Hint::none ? text : text.append(":").append(std::to_string(policy.bytes_ahead));
}

Streaming current_streaming() {
    Streaming result;
    ThreadPool::instance().run([&](ThreadPool&) { result = streaming; });
    return result;
}

void set_streaming(const Streaming& policy) {
    ThreadPool::instance().run([&](ThreadPool&) { streaming = policy; });
}

std::vector<std::vector<double>> time_streaming(const Kernels& kernels, const std::vector<Streaming>& policies,
                                                int rounds, const std::vector<Bytes>& memory) {
    std::vector<const uint8_t*> all;  // units
    for (const Bytes& each : memory)
        for (int64_t at = 0; at + kUnit <= each.count; at += kUnit) all.push_back(each.data + at);
    if (all.empty()) throw std::invalid_argument("expected at least " + std::to_string(kUnit) + " bytes in one piece");

    std::vector<std::vector<double>> seconds(policies.size());
    ThreadPool::instance().run([&](ThreadPool& pool) {
        const int64_t units = std::min<int64_t>(kUnitsPerThread * pool.team(), static_cast<int64_t>(all.size()));
        std::vector<float> ones(kRowBytes, 1.0f), y(static_cast<size_t>(pool.team() * 2 * kUnitRows));
        std::vector<float> scratch(static_cast<size_t>(pool.team()) * kLinearScratch + kRowBytes);
        // A linear operation of one generated token, and its prepared inputs.
        const auto linear_of = [](Dtype dtype) {
            Linear linear;
            linear.weight.dtype = dtype;
            linear.weight.rows = kUnitRows;
            linear.weight.width = linear.stage.width = dtype == Dtype::i8 ? kRowBytes : kRowBytes / 2;
            linear.integers = dtype == Dtype::i8;
            return linear;
        };
        std::map<Dtype, std::vector<float>> prepared;
        for (const Dtype dtype : {Dtype::f16, Dtype::i8}) {
            const Linear linear = linear_of(dtype);
            std::vector<float>& to = prepared[dtype] = ones;
            const int64_t floats = kernels.prepared_floats(linear, Role::generated, 1);
            if (floats == 0) continue;  // they are used as they are
            to.resize(static_cast<size_t>(floats));
            kernels.prepare(linear, Role::generated, ones.data(), 1, 0, 1, to.data(), scratch.data());
        }

        size_t first = 0;
        const auto read = [&](const Streaming& policy, Dtype dtype) {
            streaming = policy;
            const auto unit_at = [&](int64_t unit) { return all[(first + static_cast<size_t>(unit)) % all.size()]; };
            const auto begin = std::chrono::steady_clock::now();
            pool.each(
                units, [&](int thread) { ask_for_first(unit_at(pool.end_of_range(units, thread - 1))); },
                [&](int64_t unit, int thread) {
                    Linear linear = linear_of(dtype);
                    linear.weight.data = unit_at(unit);
                    float* to = y.data() + thread * 2 * kUnitRows;  // threads' results a cache line apart
                    kernels.multiply(linear, Role::generated, prepared.at(dtype).data(), 1, 0, 1, 0, kUnitRows, to,
                                     kUnitRows, scratch.data() + thread * kLinearScratch);
                });
            first = (first + static_cast<size_t>(units)) % all.size();
            return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
        };
        const Streaming before = streaming;
        // Once over everything: pages may still lie in a file, and threads sleep.
        for (size_t done = 0; done < all.size(); done += static_cast<size_t>(units)) read(before, Dtype::f16);
        for (int round = 0; round < rounds; ++round)
            for (size_t i = 0; i < policies.size(); ++i) {
                // Every other time in the other direction: whom one comes after is not always the same.
                const size_t policy = round % 2 ? policies.size() - 1 - i : i;
                const double floats = read(policies[policy], Dtype::f16);
                seconds[policy].push_back(floats + read(policies[policy], Dtype::i8));
            }
        streaming = before;
    });
    return seconds;
}

}  // namespace nvtripy_portable

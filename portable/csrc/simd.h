// The vector types and operations that the kernels are written in, for the instruction set that this translation unit
// is compiled for. ISA (portable; avx2, avx512, amx or amx_emulated; neon, dotprod or i8mm) is both the namespace and the
// choice.
//
// Every kernel source is compiled once for each instruction set. Whatever it defines must therefore live in namespace
// ISA, and it must not use inline functions of the standard library: the linker keeps one copy of those, which could be
// one that this CPU cannot run.
//
//   F  W floats            I  W int32            S  2W int16
#pragma once

#include <cstdint>
#include <cstring>

#include "streaming.h"

#ifndef ISA
#error "ISA must name the instruction set: portable, avx2, avx512, amx, amx_emulated, neon, dotprod or i8mm"
#endif

#define ISA_IS_portable 1
#define ISA_IS_avx2 2
#define ISA_IS_avx512 3
#define ISA_IS_amx ISA_IS_avx512
#define ISA_IS_amx_emulated ISA_IS_portable
#define ISA_IS_neon 4
#define ISA_IS_dotprod ISA_IS_neon
#define ISA_IS_i8mm ISA_IS_neon
#define ISA_JOIN(a, b) a##b
#define ISA_NUMBER(name) ISA_JOIN(ISA_IS_, name)

// Whether there are tiles besides (amx_tiles.h): 0 is no, 1 the processor's, 2 emulated ones.
#define ISA_HAS_TILES_amx 1
#define ISA_HAS_TILES_amx_emulated 2
#define ISA_TILES_OF(name) ISA_JOIN(ISA_HAS_TILES_, name)
#define ISA_TILES ISA_TILES_OF(ISA)

// Whether NEON multiplies bytes (byte_dots.h): 0 is no, 1 in pairs of vectors, 2 as small matrices too.
#define ISA_HAS_BYTES_dotprod 1
#define ISA_HAS_BYTES_i8mm 2
#define ISA_BYTES_OF(name) ISA_JOIN(ISA_HAS_BYTES_, name)
#define ISA_BYTES ISA_BYTES_OF(ISA)

#if ISA_NUMBER(ISA) == 4
#include "simd_neon.h"
#elif ISA_NUMBER(ISA) == 3
#include "simd_avx512.h"
#elif ISA_NUMBER(ISA) == 2
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace nvtripy_portable::ISA {

constexpr int64_t kPadding = 128;  // rows of inputs are padded with zeros to a multiple of this

template <class T>
constexpr T smaller(T a, T b) { return b < a ? b : a; }
template <class T>
constexpr T larger(T a, T b) { return a < b ? b : a; }

// Asks for the cache line at p, `bytes_ahead()` before its use, as `streaming` has it. The hint is part of the instruction,
// so there is a branch for each one; it always goes the same way, and costs nothing that can be measured where weights come
// from memory (from the first-level cache: 0 to 4 %). Inlined always: GCC takes a function that only prefetches for one that
// does nothing.
__attribute__((always_inline)) inline void prefetch_once(const void* p) {
    if (streaming.hint == Hint::t0) __builtin_prefetch(p, 0, 3);
    else if (streaming.hint == Hint::nta) __builtin_prefetch(p, 0, 0);
    else if (streaming.hint == Hint::t1) __builtin_prefetch(p, 0, 2);
}
inline int64_t bytes_ahead() { return streaming.bytes_ahead; }

inline float to_float_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline uint32_t float_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// How W stored numbers become W floats. kFactor is what the result has to be multiplied by.
struct F32 {
    using Stored = float;
    static constexpr float kFactor = 1;
    static F load(const float* p) { return ISA::load(p); }
};
struct F16 {
    using Stored = uint16_t;
    static constexpr float kFactor = 1;
    static F load(const uint16_t* p) { return load_f16(p); }
};
struct BF16 {
    using Stored = uint16_t;
    static constexpr float kFactor = 1;
    static F load(const uint16_t* p) { return load_bf16(p); }
};
struct I8 {
    using Stored = int8_t;
    static constexpr float kFactor = 1;
    static F load(const int8_t* p) { return load_i8(p); }
};
// E4M3's bits shifted left are a float16 that is 2^-8 of the number, subnormals included. NaN is the exception: its
// bits would be 480, so F8 is for weights that hold none, and F8WithNaN for the others.
struct F8 {
    using Stored = uint8_t;
    static constexpr float kFactor = 256;
    static F load(const uint8_t* p) { return load_f8(p); }
};
struct F8WithNaN {
    using Stored = uint8_t;
    static constexpr float kFactor = 256;
    static F load(const uint8_t* p) {
        alignas(64) float values[W];
        store(values, load_f8(p));
        for (int i = 0; i < W; ++i)
            if ((p[i] & 0x7f) == 0x7f) values[i] = __builtin_nanf("");
        return ISA::load(values);
    }
};

// 2W numbers.
template <class Numbers>
inline void load_two(const typename Numbers::Stored* p, F (&to)[2]) {
    to[0] = Numbers::load(p);
    to[1] = Numbers::load(p + W);
}
template <>
inline void load_two<F8>(const uint8_t* p, F (&to)[2]) { load_two_f8(p, to); }

// As Numbers::load, of the first `count` < W numbers at p; the others are 0.
template <class Numbers>
inline F load_part(const typename Numbers::Stored* p, int64_t count) {
    typename Numbers::Stored part[W] = {};
    std::memcpy(part, p, static_cast<size_t>(count) * sizeof part[0]);
    return Numbers::load(part);
}

inline void store_part(float* p, F values, int64_t count) {
    alignas(64) float part[W];
    store(part, values);
    std::memcpy(p, part, static_cast<size_t>(count) * sizeof part[0]);
}

// e^x to 1e-7 relative: 2^n * e^r with |r| <= ln(2)/2, e^r by its Taylor polynomial of degree 6 (error 2e-8).
inline F exp(F x) {
    x = min(max(x, set1(-87.3f)), set1(88.3f));
    const F n = round(mul(x, set1(1.44269504088896341f)));
    F r = fma(n, set1(-0.693359375f), x);  // ln(2) in two parts, so that the difference is exact
    r = fma(n, set1(2.12194440e-4f), r);
    F p = set1(1.0f / 5040);
    p = fma(p, r, set1(1.0f / 720));
    p = fma(p, r, set1(1.0f / 120));
    p = fma(p, r, set1(1.0f / 24));
    p = fma(p, r, set1(1.0f / 6));
    p = fma(p, r, set1(0.5f));
    p = fma(p, r, set1(1.0f));
    p = fma(p, r, set1(1.0f));
    return times_power_of_two(p, n);
}

}  // namespace nvtripy_portable::ISA

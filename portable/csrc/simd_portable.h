// The compiler's own vectors of 4 floats: what every 64-bit CPU has (SSE2, NEON).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace nvtripy_portable::ISA {

typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(16)));
typedef int16_t S __attribute__((vector_size(16)));
typedef int16_t HalfS __attribute__((vector_size(8)));
typedef uint16_t HalfU __attribute__((vector_size(8)));
typedef int8_t Bytes __attribute__((vector_size(8)));
constexpr int W = 4;

inline F set1(float x) { return F{x, x, x, x}; }
inline F zero() { return set1(0); }
inline F load(const float* p) {
    F x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
inline void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }
inline F add(F a, F b) { return a + b; }
inline F sub(F a, F b) { return a - b; }
inline F mul(F a, F b) { return a * b; }
inline F div(F a, F b) { return a / b; }
inline F fma(F a, F b, F c) { return a * b + c; }
// A NaN in the first operand is kept.
inline F max(F a, F b) { return a < b ? b : a; }
inline F min(F a, F b) { return a > b ? b : a; }
// For |x| < 2^22: adding and taking away 1.5 * 2^23 leaves no fraction.
inline F round(F x) { return (x + 12582912.0f) - 12582912.0f; }
inline F times_power_of_two(F x, F n) {
    const I exponent = (__builtin_convertvector(n, I) + 127) << 23;
    return x * reinterpret_cast<F>(exponent);
}
inline float sum(F x) { return (x[0] + x[2]) + (x[1] + x[3]); }

// float16 as integers, widened: its bits in the place of a float32's are 2^-112 of the number.
inline F from_f16_bits(U bits) {
    const U magnitude = (bits & 0x7fffu) << 13;
    const U special = reinterpret_cast<U>((bits & 0x7c00u) == 0x7c00u) & 0x7f800000u;  // infinity or NaN
    const F value = reinterpret_cast<F>(magnitude) * 0x1p112f;
    return reinterpret_cast<F>(reinterpret_cast<U>(value) | special | ((bits & 0x8000u) << 16));
}
inline F load_f16(const uint16_t* p) {
#if defined(__aarch64__)
    float16x4_t half;
    std::memcpy(&half, p, sizeof half);
    return reinterpret_cast<F>(vcvt_f32_f16(half));
#else
    HalfU half;
    std::memcpy(&half, p, sizeof half);
    return from_f16_bits(__builtin_convertvector(half, U));
#endif
}
inline F load_bf16(const uint16_t* p) {
    HalfU half;
    std::memcpy(&half, p, sizeof half);
    return reinterpret_cast<F>(__builtin_convertvector(half, U) << 16);
}
inline F load_i8(const int8_t* p) {
    return F{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])};
}
// As load_f16 of the bits shifted left, without a float16's infinity and NaN: E4M3 does not reach them.
inline F load_f8(const uint8_t* p) {
    const U bits = {p[0], p[1], p[2], p[3]};
    const F value = reinterpret_cast<F>((bits & 0x7fu) << 20) * 0x1p112f;
    return reinterpret_cast<F>(reinterpret_cast<U>(value) | ((bits & 0x80u) << 24));
}
inline void load_two_f8(const uint8_t* p, F (&to)[2]) {
    to[0] = load_f8(p);
    to[1] = load_f8(p + W);
}

inline I zero_i() { return I{0, 0, 0, 0}; }
inline F to_float(I x) { return __builtin_convertvector(x, F); }
inline S load_s(const int16_t* p) {
    S x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
inline S widen_i8(const int8_t* p) {
    Bytes bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(bytes, S);
}
// Lane j of the result: sum[j] + a[2j] * b[2j] + a[2j + 1] * b[2j + 1].
inline I dot(I sum, S a, S b) {
#if defined(__SSE2__)
    return sum + reinterpret_cast<I>(_mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#elif defined(__aarch64__)
    const int16x8_t x = reinterpret_cast<int16x8_t>(a), y = reinterpret_cast<int16x8_t>(b);
    return sum + reinterpret_cast<I>(vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y)));
#else
    for (int j = 0; j < W; ++j) sum[j] += a[2 * j] * b[2 * j] + a[2 * j + 1] * b[2 * j + 1];
    return sum;
#endif
}

// 8W int4 in 4W bytes: part q holds elements q, q + 4, q + 8, ...
struct Nibbles {
    S words;
    explicit Nibbles(const uint8_t* p) { std::memcpy(&words, p, sizeof words); }
    S part0() const { return (words << 12) >> 12; }
    S part1() const { return (words << 8) >> 12; }
    S part2() const { return (words << 4) >> 12; }
    S part3() const { return words >> 12; }
};

// Each of W / 4 numbers in four neighbouring lanes.
inline F spread(const float* p) { return set1(p[0]); }

// Rows become columns.
inline void transpose(F (&v)[4]) {
    const F a = v[0], b = v[1], c = v[2], d = v[3];
    for (int i = 0; i < 4; ++i) v[i] = F{a[i], b[i], c[i], d[i]};
}

// W pairs of stored numbers as the W first ones and the W second ones.
inline void split_f16(S pairs, F (&to)[2]) {
    uint16_t from[2 * W], parts[2 * W];
    std::memcpy(from, &pairs, sizeof from);
    for (int i = 0; i < W; ++i) parts[i] = from[2 * i], parts[W + i] = from[2 * i + 1];
    to[0] = load_f16(parts);
    to[1] = load_f16(parts + W);
}
inline void split_bf16(S pairs, F (&to)[2]) {
    to[0] = reinterpret_cast<F>(reinterpret_cast<U>(pairs) << 16);
    to[1] = reinterpret_cast<F>(reinterpret_cast<U>(pairs) & 0xffff0000u);
}

inline S as_numbers(F x) { return reinterpret_cast<S>(x); }
inline F as_floats(S x) { return reinterpret_cast<F>(x); }
inline void store_s(int16_t* p, S x) { std::memcpy(p, &x, sizeof x); }
// Two numbers, over and over.
inline S set1_pair(const int16_t* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return reinterpret_cast<S>(I{pair, pair, pair, pair});
}
// sum = dot(sum, a, b)
inline void add_dot(I& sum, S a, S b) { sum = dot(sum, a, b); }

inline void prefetch(const void* p) { __builtin_prefetch(p); }

}  // namespace nvtripy_portable::ISA

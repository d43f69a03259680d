// Conversions of single numbers, in namespace ISA so that the compiler can vectorise loops of them for it.
#pragma once

#include "simd.h"

namespace nvtripy_portable::ISA {

// To the nearest, a half to the even, as float16. Overflow becomes infinity.
inline uint16_t to_f16(float value) {
    const uint32_t bits = float_bits(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {
        // Subnormal: adding 0.5 leaves a mantissa whose last place is 2^-24, float16's smallest.
        const float shifted = to_float_bits(magnitude) + 0.5f;
        return static_cast<uint16_t>(sign | (float_bits(shifted) - 0x3f000000u));
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

// To the nearest, a half to the even, as bfloat16.
inline uint16_t to_bf16(float value) {
    const uint32_t bits = float_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// To the nearest number of E4M3, a half to the even. What does not fit saturates at 448; NaN stays.
inline float round_f8(float value) {
    const uint32_t bits = float_bits(value);
    const uint32_t sign = bits & 0x80000000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    const float absolute = to_float_bits(magnitude);
    const float normal = to_float_bits((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) & 0xfff00000u);
    const float subnormal = (absolute + 24576.0f) - 24576.0f;  // 1.5 * 2^14, whose last place is 2^-9
    float rounded = absolute < 0.015625f ? subnormal : normal;
    rounded = rounded > 448.0f ? 448.0f : rounded;
    rounded = magnitude > 0x7f800000u ? value : rounded;
    return to_float_bits(float_bits(rounded) | sign);
}

// The byte of the number of E4M3 that round_f8 gives.
inline uint8_t f8_code(float value) {
    const uint32_t bits = float_bits(round_f8(value));
    const uint32_t sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint8_t>(sign | 0x7fu);
    // Subnormals are multiples of 2^-9; others have a bias of 7 instead of 127.
    const uint32_t small = static_cast<uint32_t>(to_float_bits(magnitude) * 512.0f);
    return static_cast<uint8_t>(sign | (magnitude < 0x3c800000u ? small : (magnitude >> 20) - (120u << 3)));
}

// To the nearest integer, a half to the even, within int8. NaN becomes 0.
inline float round_i8(float value) {
    value = value == value ? value : 0.0f;
    value = value > 127.0f ? 127.0f : value;
    value = value < -128.0f ? -128.0f : value;
    return (value + 12582912.0f) - 12582912.0f;
}

}  // namespace nvtripy_portable::ISA

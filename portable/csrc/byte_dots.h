// Products of int8 and int4 weights with inputs of 16 bits on NEON with products of bytes: an input is taken apart into two
// bytes, x = 256 * high + low, both signed, and either meets the weights. Sums of 16 numbers at a time, of four rows: by
// SDOT, which adds four products of bytes to each lane, or by SMMLA, which multiplies two rows of eight bytes with two
// columns: here two rows of weights with the high and the low bytes of the inputs.
//
// All of this is exact, and a row's sum becomes one integer before it becomes a float: so its bits depend neither on the
// instruction nor on which rows and tokens share a tile. No sum overflows: 128 products of at most 2^15 * 2^7 are 2^29.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace nvtripy_portable::ISA {

constexpr float kLargestForInt4 = 127 * 256 + 127, kLargestForInt8 = kLargestForInt4;
// An int4 weight is used as 16 times what it is: as the high half of a byte it has its sign already.
constexpr float kUnitOfInt4 = 1.0f / 16;

// Of 16 inputs the 16 high bytes and the 16 low ones; or, for SMMLA, 8 and 8 by turns.
inline void arrange_16(int16x8_t first, int16x8_t second, int16_t* to) {
    const int8x16_t high = vcombine_s8(vrshrn_n_s16(first, 8), vrshrn_n_s16(second, 8));
    const int8x16_t low = vcombine_s8(vmovn_s16(first), vmovn_s16(second));
#if ISA_BYTES == 2
    vst1q_s16(to, vcombine_s16(vget_low_s16(vreinterpretq_s16_s8(high)), vget_low_s16(vreinterpretq_s16_s8(low))));
    vst1q_s16(to + 8, vcombine_s16(vget_high_s16(vreinterpretq_s16_s8(high)), vget_high_s16(vreinterpretq_s16_s8(low))));
#else
    vst1q_s16(to, vreinterpretq_s16_s8(high));
    vst1q_s16(to + 8, vreinterpretq_s16_s8(low));
#endif
}

// 128 integers in [-32768, kLargestForInt8], in the order in which the kernels want them.
inline void arrange_for_int8(const int16_t* values, int16_t* to) {
    for (int i = 0; i < 128; i += 16) arrange_16(vld1q_s16(values + i), vld1q_s16(values + i + 8), to + i);
}

// The same for int4 weights, of which a byte holds an even and an odd one: of 32 the even ones, then the odd ones.
inline void arrange_for_int4(const int16_t* values, int16_t* to, int32_t*) {
    for (int i = 0; i < 128; i += 32) {
        const int16x8x2_t first = vld2q_s16(values + i), second = vld2q_s16(values + i + 16);
        for (int odd = 0; odd < 2; ++odd) arrange_16(first.val[odd], second.val[odd], to + i + odd * 16);
    }
}

// 32 weights of a row, in that order.
template <bool kInt4>
inline void load_32(const uint8_t* p, int8x16_t (&to)[2]) {
    const int8x16_t first = vreinterpretq_s8_u8(vld1q_u8(p));
    to[0] = kInt4 ? vshlq_n_s8(first, 4) : first;
    to[1] = kInt4 ? vandq_s8(first, vdupq_n_s8(static_cast<int8_t>(0xF0))) : vreinterpretq_s8_u8(vld1q_u8(p + 16));
}

// 16 weights of four rows: row by row; or, for SMMLA, eight of the first two rows, the other eight, and so of the others.
struct FourRows {
    int8x16_t parts[4];
};
inline FourRows four_rows(int8x16_t p, int8x16_t q, int8x16_t r, int8x16_t s) {
#if ISA_BYTES == 2
    const auto words = [](int8x16_t x) { return vreinterpretq_s64_s8(x); };
    const auto bytes = [](int64x2_t x) { return vreinterpretq_s8_s64(x); };
    return {{bytes(vzip1q_s64(words(p), words(q))), bytes(vzip2q_s64(words(p), words(q))),
             bytes(vzip1q_s64(words(r), words(s))), bytes(vzip2q_s64(words(r), words(s)))}};
#else
    return {{p, q, r, s}};
#endif
}

// The sums of one token with four rows.
struct FourSums {
#if ISA_BYTES == 2
    int32x4_t pairs[2];  // of two rows each: the first one's with high and with low bytes, the second one's
#else
    int32x4_t high[4], low[4];
#endif
};
inline FourSums no_sums() {
    const int32x4_t none = vdupq_n_s32(0);
#if ISA_BYTES == 2
    return {{none, none}};
#else
    return {{none, none, none, none}, {none, none, none, none}};
#endif
}

// Adds the products of 16 inputs.
inline void add_16(FourSums& sums, const FourRows& rows, const int16_t* x) {
    const int8x16_t first = vreinterpretq_s8_s16(vld1q_s16(x)), second = vreinterpretq_s8_s16(vld1q_s16(x + 8));
#if ISA_BYTES == 2
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
        sums.pairs[i] = vmmlaq_s32(vmmlaq_s32(sums.pairs[i], rows.parts[2 * i], first), rows.parts[2 * i + 1], second);
#else
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
        sums.high[r] = vdotq_s32(sums.high[r], rows.parts[r], first);
        sums.low[r] = vdotq_s32(sums.low[r], rows.parts[r], second);
    }
#endif
}

// What each row has come to.
inline float32x4_t total(const FourSums& sums) {
#if ISA_BYTES == 2
    const int32x4_t high = vuzp1q_s32(sums.pairs[0], sums.pairs[1]), low = vuzp2q_s32(sums.pairs[0], sums.pairs[1]);
#else
    const auto of_rows = [](const int32x4_t(&lanes)[4]) {
        return vpaddq_s32(vpaddq_s32(lanes[0], lanes[1]), vpaddq_s32(lanes[2], lanes[3]));
    };
    const int32x4_t high = of_rows(sums.high), low = of_rows(sums.low);
#endif
    return vcvtq_f32_s32(vaddq_s32(vshlq_n_s32(high, 8), low));
}

}  // namespace nvtripy_portable::ISA

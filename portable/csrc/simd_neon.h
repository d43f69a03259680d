// NEON, which every 64-bit ARM processor has: 8 floats in two registers. A vector of one register would leave too few sums
// under way at a time to hide how long an addition takes, and would load float16 and int8 numbers by 8 or 4 bytes.
//
// Arithmetic in float16 is not used: its sums are less precise than float32's, and the multiply-adds of float16 that add to
// float32 (FMLAL) want inputs in two parts to be as precise, which takes as many instructions as widening the weights for one
// token, 7 for 8 weights, and more for several (25 instead of 19 for four).
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace nvtripy_portable::ISA {

struct F {
    float32x4_t a, b;
};
struct I {
    int32x4_t a, b;
};
struct S {
    int16x8_t a, b;
};
constexpr int W = 8;

inline F set1(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
inline F zero() { return set1(0); }
inline F load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
inline void store(float* p, F x) {
    vst1q_f32(p, x.a);
    vst1q_f32(p + 4, x.b);
}
inline F add(F x, F y) { return {vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b)}; }
inline F sub(F x, F y) { return {vsubq_f32(x.a, y.a), vsubq_f32(x.b, y.b)}; }
inline F mul(F x, F y) { return {vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b)}; }
inline F div(F x, F y) { return {vdivq_f32(x.a, y.a), vdivq_f32(x.b, y.b)}; }
inline F fma(F x, F y, F z) { return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b)}; }
// A NaN in either operand is kept.
inline F max(F x, F y) { return {vmaxq_f32(x.a, y.a), vmaxq_f32(x.b, y.b)}; }
inline F min(F x, F y) { return {vminq_f32(x.a, y.a), vminq_f32(x.b, y.b)}; }
inline F round(F x) { return {vrndnq_f32(x.a), vrndnq_f32(x.b)}; }

inline float32x4_t power_of_two(float32x4_t n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23));
}
inline F times_power_of_two(F x, F n) { return mul(x, F{power_of_two(n.a), power_of_two(n.b)}); }

inline float sum(F x) { return vaddvq_f32(vaddq_f32(x.a, x.b)); }

inline F from_halves(uint16x8_t bits) {
    const float16x8_t halves = vreinterpretq_f16_u16(bits);
    return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
}
inline F load_f16(const uint16_t* p) { return from_halves(vld1q_u16(p)); }
inline void store_f16(uint16_t* p, F x) {
    vst1q_u16(p, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.a), x.b)));
}
inline F load_bf16(const uint16_t* p) {
    const uint16x8_t bits = vld1q_u16(p);
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(bits), 16)), vreinterpretq_f32_u32(vshll_high_n_u16(bits, 16))};
}
inline F load_i8(const int8_t* p) {
    const int16x8_t wide = vmovl_s8(vld1_s8(p));
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_high_s16(wide))};
}
// E4M3's bits, shifted left with their sign, of which a second copy is taken out.
inline F from_f8(int16x8_t shifted) {
    return from_halves(vandq_u16(vreinterpretq_u16_s16(shifted), vdupq_n_u16(0xBFFF)));
}
inline F load_f8(const uint8_t* p) { return from_f8(vshll_n_s8(vreinterpret_s8_u8(vld1_u8(p)), 7)); }
// The same of 2W numbers, loaded together.
inline void load_two_f8(const uint8_t* p, F (&to)[2]) {
    const int8x16_t bytes = vreinterpretq_s8_u8(vld1q_u8(p));
    to[0] = from_f8(vshll_n_s8(vget_low_s8(bytes), 7));
    to[1] = from_f8(vshll_high_n_s8(bytes, 7));
}

inline I zero_i() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
inline F to_float(I x) { return {vcvtq_f32_s32(x.a), vcvtq_f32_s32(x.b)}; }
inline S load_s(const int16_t* p) { return {vld1q_s16(p), vld1q_s16(p + 8)}; }
inline S widen_i8(const int8_t* p) {
    const int8x16_t bytes = vld1q_s8(p);
    return {vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes)};
}
// Lane j of the result: sum[j] and two of the products a[i] * b[i], those of the first half in the first four lanes.
inline int32x4_t dot(int32x4_t sum, int16x8_t a, int16x8_t b) {
    return vmlal_high_s16(vmlal_s16(sum, vget_low_s16(a), vget_low_s16(b)), a, b);
}
inline I dot(I sum, S a, S b) { return {dot(sum.a, a.a, b.a), dot(sum.b, a.b, b.b)}; }

// 8W int4 in 4W bytes: part q holds elements q, q + 4, q + 8, ...
struct Nibbles {
    S words;
    explicit Nibbles(const uint8_t* p)
        : words{vreinterpretq_s16_u8(vld1q_u8(p)), vreinterpretq_s16_u8(vld1q_u8(p + 16))} {}
    template <int kShift>
    S part() const { return {vshrq_n_s16(vshlq_n_s16(words.a, kShift), 12), vshrq_n_s16(vshlq_n_s16(words.b, kShift), 12)}; }
    S part0() const { return part<12>(); }
    S part1() const { return part<8>(); }
    S part2() const { return part<4>(); }
    S part3() const { return {vshrq_n_s16(words.a, 12), vshrq_n_s16(words.b, 12)}; }
};

// Each of W / 4 numbers in four neighbouring lanes.
inline F spread(const float* p) { return {vld1q_dup_f32(p), vld1q_dup_f32(p + 1)}; }

// Four rows become four columns.
inline void transpose(float32x4_t& p, float32x4_t& q, float32x4_t& r, float32x4_t& s) {
    const auto pq_even = vreinterpretq_f64_f32(vtrn1q_f32(p, q)), pq_odd = vreinterpretq_f64_f32(vtrn2q_f32(p, q));
    const auto rs_even = vreinterpretq_f64_f32(vtrn1q_f32(r, s)), rs_odd = vreinterpretq_f64_f32(vtrn2q_f32(r, s));
    p = vreinterpretq_f32_f64(vzip1q_f64(pq_even, rs_even));
    q = vreinterpretq_f32_f64(vzip1q_f64(pq_odd, rs_odd));
    r = vreinterpretq_f32_f64(vzip2q_f64(pq_even, rs_even));
    s = vreinterpretq_f32_f64(vzip2q_f64(pq_odd, rs_odd));
}

// Rows become columns.
inline void transpose(F (&v)[8]) {
    transpose(v[0].a, v[1].a, v[2].a, v[3].a);
    transpose(v[4].b, v[5].b, v[6].b, v[7].b);
    transpose(v[0].b, v[1].b, v[2].b, v[3].b);
    transpose(v[4].a, v[5].a, v[6].a, v[7].a);
    for (int i = 0; i < 4; ++i) {
        const float32x4_t corner = v[i].b;
        v[i].b = v[4 + i].a;
        v[4 + i].a = corner;
    }
}

// W pairs of stored numbers as the W first ones and the W second ones.
inline void split_f16(S pairs, F (&to)[2]) {
    to[0] = from_halves(vreinterpretq_u16_s16(vuzp1q_s16(pairs.a, pairs.b)));
    to[1] = from_halves(vreinterpretq_u16_s16(vuzp2q_s16(pairs.a, pairs.b)));
}
inline void split_bf16(S pairs, F (&to)[2]) {
    const uint32x4_t a = vreinterpretq_u32_s16(pairs.a), b = vreinterpretq_u32_s16(pairs.b), second = vdupq_n_u32(0xffff0000u);
    to[0] = {vreinterpretq_f32_u32(vshlq_n_u32(a, 16)), vreinterpretq_f32_u32(vshlq_n_u32(b, 16))};
    to[1] = {vreinterpretq_f32_u32(vandq_u32(a, second)), vreinterpretq_f32_u32(vandq_u32(b, second))};
}

inline S as_numbers(F x) { return {vreinterpretq_s16_f32(x.a), vreinterpretq_s16_f32(x.b)}; }
inline F as_floats(S x) { return {vreinterpretq_f32_s16(x.a), vreinterpretq_f32_s16(x.b)}; }

inline void prefetch(const void* p) { __builtin_prefetch(p); }

}  // namespace nvtripy_portable::ISA

// AVX2, FMA and F16C: 8 floats a vector.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace nvtripy_portable::ISA {

using F = __m256;
using I = __m256i;
using S = __m256i;
constexpr int W = 8;

inline F zero() { return _mm256_setzero_ps(); }
inline F set1(float x) { return _mm256_set1_ps(x); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F x) { _mm256_storeu_ps(p, x); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F div(F a, F b) { return _mm256_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
// Where an operand is NaN the second is returned: min(max(x, low), high) would lose a NaN in x, so x stands second.
inline F max(F a, F b) { return _mm256_max_ps(b, a); }
inline F min(F a, F b) { return _mm256_min_ps(b, a); }
inline F round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F times_power_of_two(F x, F n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

inline float sum(F x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

inline F load_f16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store_f16(uint16_t* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline F load_bf16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline F load_i8(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline F load_f8(const uint8_t* p) {
    const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(static_cast<int16_t>(0xBFFF))));
}
// The same of 2W numbers, widened together.
inline void load_two_f8(const uint8_t* p, F (&to)[2]) {
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<int16_t>(0xBFFF)));
    to[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
    to[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
}

inline I zero_i() { return _mm256_setzero_si256(); }
inline F to_float(I x) { return _mm256_cvtepi32_ps(x); }
inline S load_s(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline S widen_i8(const int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// Lane j of the result: sum[j] + a[2j] * b[2j] + a[2j + 1] * b[2j + 1].
inline I dot(I sum, S a, S b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }

// 8W int4 in 4W bytes: part q holds elements q, q + 4, q + 8, ...
struct Nibbles {
    __m256i words;
    explicit Nibbles(const uint8_t* p) : words(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))) {}
    S part0() const { return _mm256_srai_epi16(_mm256_slli_epi16(words, 12), 12); }
    S part1() const { return _mm256_srai_epi16(_mm256_slli_epi16(words, 8), 12); }
    S part2() const { return _mm256_srai_epi16(_mm256_slli_epi16(words, 4), 12); }
    S part3() const { return _mm256_srai_epi16(words, 12); }
};

// Each of W / 4 numbers in four neighbouring lanes.
inline F spread(const float* p) { return _mm256_set_m128(_mm_set1_ps(p[1]), _mm_set1_ps(p[0])); }

// Rows become columns.
inline void transpose(F (&v)[8]) {
    F quads[8];
    for (int i = 0; i < 8; i += 4) {
        const F a = _mm256_unpacklo_ps(v[i], v[i + 1]), b = _mm256_unpackhi_ps(v[i], v[i + 1]);
        const F c = _mm256_unpacklo_ps(v[i + 2], v[i + 3]), d = _mm256_unpackhi_ps(v[i + 2], v[i + 3]);
        quads[i] = _mm256_shuffle_ps(a, c, 0x44);
        quads[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
        quads[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
        quads[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
    for (int c = 0; c < 4; ++c) {
        v[c] = _mm256_permute2f128_ps(quads[c], quads[4 + c], 0x20);
        v[4 + c] = _mm256_permute2f128_ps(quads[c], quads[4 + c], 0x31);
    }
}

// W pairs of stored numbers as the W first ones and the W second ones.
inline void split_f16(S pairs, F (&to)[2]) {
    const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,  //
                                           0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    const __m256i apart = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(pairs, order), 0xd8);
    to[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(apart));
    to[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(apart, 1));
}
inline void split_bf16(S pairs, F (&to)[2]) {
    to[0] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    to[1] = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000))));
}

inline S as_numbers(F x) { return _mm256_castps_si256(x); }
inline F as_floats(S x) { return _mm256_castsi256_ps(x); }
inline void store_s(int16_t* p, S x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
// sum = dot(sum, a, b)
inline void add_dot(I& sum, S a, S b) { sum = dot(sum, a, b); }
// Two numbers, over and over.
inline S set1_pair(const int16_t* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return _mm256_set1_epi32(pair);
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace nvtripy_portable::ISA

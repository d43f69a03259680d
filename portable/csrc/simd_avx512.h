// AVX-512 F, BW, VL, DQ and VNNI: 16 floats a vector.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace nvtripy_portable::ISA {

using F = __m512;
using I = __m512i;
using S = __m512i;
constexpr int W = 16;

inline F zero() { return _mm512_setzero_ps(); }
inline F set1(float x) { return _mm512_set1_ps(x); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
// Where an operand is NaN the second is returned: min(max(x, low), high) would lose a NaN in x, so x stands second.
inline F max(F a, F b) { return _mm512_max_ps(b, a); }
inline F min(F a, F b) { return _mm512_min_ps(b, a); }
inline F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F times_power_of_two(F x, F n) { return _mm512_scalef_ps(x, n); }

inline float sum(F x) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}

// The same of four vectors, added up in the same order: element i is the sum of v[i].
inline __m128 sum_four(const F (&v)[4]) {
    const auto halves = [](F a, F b) { return add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee)); };
    const F ab = halves(v[0], v[1]), cd = halves(v[2], v[3]);
    F each = add(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    each = add(each, _mm512_permute_ps(each, 0x4e));
    each = add(each, _mm512_permute_ps(each, 0xb1));
    return _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, each));
}
// Four numbers of memory become, or get added, these.
inline void add_four(float* to, __m128 x, bool add_to) {
    _mm_storeu_ps(to, _mm_add_ps(add_to ? _mm_loadu_ps(to) : _mm_setzero_ps(), x));
}

inline F load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store_f16(uint16_t* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline F load_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline F load_i8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline F load_f8(const uint8_t* p) {
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<int16_t>(0xBFFF))));
}
// The same of 2W numbers, widened together.
inline void load_two_f8(const uint8_t* p, F (&to)[2]) {
    const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    const __m512i half = _mm512_and_si512(_mm512_slli_epi16(wide, 7), _mm512_set1_epi16(static_cast<int16_t>(0xBFFF)));
    to[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
    to[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
}

inline I zero_i() { return _mm512_setzero_si512(); }
inline F to_float(I x) { return _mm512_cvtepi32_ps(x); }
inline S load_s(const int16_t* p) { return _mm512_loadu_si512(p); }
inline S widen_i8(const int8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// Lane j of the result: sum[j] + a[2j] * b[2j] + a[2j + 1] * b[2j + 1].
inline I dot(I sum, S a, S b) { return _mm512_dpwssd_epi32(sum, a, b); }

// 8W int4 in 4W bytes: part q holds elements q, q + 4, q + 8, ...
struct Nibbles {
    __m512i words;
    explicit Nibbles(const uint8_t* p) : words(_mm512_loadu_si512(p)) {}
    S part0() const { return _mm512_srai_epi16(_mm512_slli_epi16(words, 12), 12); }
    S part1() const { return _mm512_srai_epi16(_mm512_slli_epi16(words, 8), 12); }
    S part2() const { return _mm512_srai_epi16(_mm512_slli_epi16(words, 4), 12); }
    S part3() const { return _mm512_srai_epi16(words, 12); }
};

// Each of W / 4 numbers in four neighbouring lanes.
inline F spread(const float* p) {
    const __m512i index = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_ps(index, _mm512_castps128_ps512(_mm_loadu_ps(p)));
}

// Of four vectors of integers: lane 4 q + i of the result is the sum of v[i]'s lanes 4 q to 4 q + 3.
inline I add_neighbours(const I* v) {
    const auto pair = [](I a, I b) { return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)); };
    const I first = pair(v[0], v[1]), second = pair(v[2], v[3]);
    return _mm512_add_epi32(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second));
}
// Of 16: element i is the sum of v[i]'s lanes.
inline I add_lanes(const I (&v)[16]) {
    const auto halves = [](I a, I b) {
        return _mm512_add_epi32(_mm512_shuffle_i64x2(a, b, 0x88), _mm512_shuffle_i64x2(a, b, 0xdd));
    };
    return halves(halves(add_neighbours(v), add_neighbours(v + 4)), halves(add_neighbours(v + 8), add_neighbours(v + 12)));
}
// The same of each quarter of the lanes: element i of to[q] is the sum of v[i]'s lanes 4 q to 4 q + 3.
inline void add_quarters(const I (&v)[16], I (&to)[4]) {
    const I a = add_neighbours(v), b = add_neighbours(v + 4), c = add_neighbours(v + 8), d = add_neighbours(v + 12);
    const I even_ab = _mm512_shuffle_i64x2(a, b, 0x88), odd_ab = _mm512_shuffle_i64x2(a, b, 0xdd);
    const I even_cd = _mm512_shuffle_i64x2(c, d, 0x88), odd_cd = _mm512_shuffle_i64x2(c, d, 0xdd);
    to[0] = _mm512_shuffle_i64x2(even_ab, even_cd, 0x88);
    to[1] = _mm512_shuffle_i64x2(odd_ab, odd_cd, 0x88);
    to[2] = _mm512_shuffle_i64x2(even_ab, even_cd, 0xdd);
    to[3] = _mm512_shuffle_i64x2(odd_ab, odd_cd, 0xdd);
}

// Rows become columns.
inline void transpose(F (&v)[16]) {
    __m512d pairs[16];
    for (int i = 0; i < 16; i += 4) {
        const __m512 a = _mm512_unpacklo_ps(v[i], v[i + 1]), b = _mm512_unpackhi_ps(v[i], v[i + 1]);
        const __m512 c = _mm512_unpacklo_ps(v[i + 2], v[i + 3]), d = _mm512_unpackhi_ps(v[i + 2], v[i + 3]);
        pairs[i] = _mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(c));
        pairs[i + 1] = _mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(c));
        pairs[i + 2] = _mm512_unpacklo_pd(_mm512_castps_pd(b), _mm512_castps_pd(d));
        pairs[i + 3] = _mm512_unpackhi_pd(_mm512_castps_pd(b), _mm512_castps_pd(d));
    }
    // Lane l of pairs[4 r + c] is column 4 l + c of rows 4 r to 4 r + 3.
    for (int c = 0; c < 4; ++c) {
        const F p = _mm512_castpd_ps(pairs[c]), q = _mm512_castpd_ps(pairs[4 + c]);
        const F r = _mm512_castpd_ps(pairs[8 + c]), s = _mm512_castpd_ps(pairs[12 + c]);
        const F pq_even = _mm512_shuffle_f32x4(p, q, 0x88), pq_odd = _mm512_shuffle_f32x4(p, q, 0xdd);
        const F rs_even = _mm512_shuffle_f32x4(r, s, 0x88), rs_odd = _mm512_shuffle_f32x4(r, s, 0xdd);
        v[c] = _mm512_shuffle_f32x4(pq_even, rs_even, 0x88);
        v[4 + c] = _mm512_shuffle_f32x4(pq_odd, rs_odd, 0x88);
        v[8 + c] = _mm512_shuffle_f32x4(pq_even, rs_even, 0xdd);
        v[12 + c] = _mm512_shuffle_f32x4(pq_odd, rs_odd, 0xdd);
    }
}

// W pairs of stored numbers as the W first ones and the W second ones.
inline void split_f16(S pairs, F (&to)[2]) {
    to[0] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs));
    to[1] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
}
inline void split_bf16(S pairs, F (&to)[2]) {
    to[0] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    to[1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000))));
}

inline S as_numbers(F x) { return _mm512_castps_si512(x); }
inline F as_floats(S x) { return _mm512_castsi512_ps(x); }
inline void store_s(int16_t* p, S x) { _mm512_storeu_si512(p, x); }
// sum = dot(sum, a, b), in place: GCC 12 copies the sums of the intrinsic from register to register, and to memory too.
inline void add_dot(I& sum, S a, S b) { asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }
// The same of four bytes a lane, a's without a sign, b's with one.
inline void add_byte_dot(I& sum, S a, S b) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }
// Two numbers, over and over.
inline S set1_pair(const int16_t* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return _mm512_set1_epi32(pair);
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace nvtripy_portable::ISA

// Products of int4 weights on AVX-512 with VNNI: 64 multiply-adds of bytes in an instruction. An input's 16 bits are taken
// apart, x = 256 * high + low with both parts int8, and weights are made unsigned by adding 8, which takes one logical
// operation; what that adds to the sum, 8 for every input, is known when the inputs are prepared, and sums begin at its
// negative. All of this is exact.
//
// A byte holds an even and an odd element. Their halves meet different inputs, so nothing has to be put in order: 128
// inputs are stored as the high parts of the even ones, of the odd ones, and the low parts of both. 32-bit lane j of a sum
// has elements 8j to 8j + 7.
#pragma once

#include "kernels.h"
#include "products.h"
#include "scales.h"
#include "simd.h"

namespace nvtripy_portable::ISA {

constexpr float kLargestForInt4 = 127 * 256 + 127;

// The lower int4 of each byte, plus 8.
inline I unsigned_nibbles(I bytes) {
    return _mm512_ternarylogic_epi32(bytes, _mm512_set1_epi8(15), _mm512_set1_epi8(8), 0x6A);  // (bytes & 15) ^ 8
}

// 128 integers in [-32768, kLargestForInt4] as described above, and where their sums begin.
inline void arrange_for_int4(const int16_t* values, int16_t* to, int32_t* begin) {
    auto* parts = reinterpret_cast<int8_t*>(to);
    for (int i = 0; i < 4; ++i) {
        const __m512i pairs = _mm512_loadu_si512(values + i * 32);
        const __m512i both[2] = {_mm512_srai_epi32(_mm512_slli_epi32(pairs, 16), 16), _mm512_srai_epi32(pairs, 16)};
        for (int odd = 0; odd < 2; ++odd) {
            const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(both[odd], _mm512_set1_epi32(128)), 8);
            auto* part = reinterpret_cast<__m128i*>(parts + odd * 64 + i * 16);
            _mm_storeu_si128(part, _mm512_cvtepi32_epi8(high));
            _mm_storeu_si128(part + 8, _mm512_cvtepi32_epi8(both[odd]));
        }
    }
    __m512i sums[2];
    for (int low = 0; low < 2; ++low) {
        sums[low] = _mm512_setzero_si512();
        for (int odd = 0; odd < 2; ++odd)
            sums[low] = _mm512_dpbusd_epi32(sums[low], _mm512_set1_epi8(8),
                                            _mm512_loadu_si512(parts + low * 128 + odd * 64));
    }
    const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(sums[0], 8), sums[1]);
    _mm512_storeu_si512(begin, _mm512_sub_epi32(_mm512_setzero_si512(), sum));
}

// Four scales, each in the four lanes of its 32 weights.
inline F spread_groups(const float* own, int64_t first, int64_t block, int64_t count) {
    const auto at = [&](int64_t group) { return own[group_scale(group, block, count)]; };
    const __m128 four = block == 32 && first + 4 <= count
                            ? _mm_loadu_ps(own + first)
                            : _mm_setr_ps(at(first), at(first + 1), at(first + 2), at(first + 3));
    const __m512i index = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_ps(index, _mm512_castps128_ps512(four));
}

template <int kTokens, int kRows, Scales kScales>
inline void byte_tile(const Matrix& weight, const IntegerRow* x, int64_t n, float* y, int64_t y_stride) {
    const int64_t row_bytes = weight.row_bytes();
    const auto* base = static_cast<const uint8_t*>(weight.data) + n * row_bytes;
    const float* scales = weight.scales + n * weight.scale_stride;
    const int64_t blocks = (weight.width + 127) / 128, whole = weight.width / 128;
    F sums[kTokens][kRows];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sums[t][r] = zero();
    const auto add_block = [&](int64_t b, const __m512i (&words)[kRows]) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            const I even = unsigned_nibbles(words[r]), odd = unsigned_nibbles(_mm512_srli_epi16(words[r], 4));
            const float* own = scales + r * weight.scale_stride;
            F scale = zero();
            if constexpr (kScales == Scales::group)
                scale = spread_groups(own, b * 4, weight.block, weight.scale_stride);
#pragma GCC unroll 4
            for (int t = 0; t < kTokens; ++t) {
                const auto* parts = reinterpret_cast<const int8_t*>(x[t].values + b * 128);
                __m512i high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), even, _mm512_loadu_si512(parts));
                high = _mm512_dpbusd_epi32(high, odd, _mm512_loadu_si512(parts + 64));
                __m512i low = _mm512_loadu_si512(x[t].begin + b * W);
                low = _mm512_dpbusd_epi32(low, even, _mm512_loadu_si512(parts + 128));
                low = _mm512_dpbusd_epi32(low, odd, _mm512_loadu_si512(parts + 192));
                const F product = to_float(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
                F by = set1(x[t].scales[b]);
                if constexpr (kScales == Scales::block) by = set1(x[t].scales[b] * own[b]);
                if constexpr (kScales == Scales::group) by = mul(scale, by);
                sums[t][r] = fma(product, by, sums[t][r]);
            }
        }
    };
    __m512i words[kRows];
    for (int64_t b = 0; b < whole; ++b) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            words[r] = _mm512_loadu_si512(base + r * row_bytes + b * 64);
            // Asked for in the order of the memory, not in that of the blocks.
            prefetch_once(base + bytes_ahead() + (b * kRows + r) * 64);
        }
        add_block(b, words);
    }
    if (whole < blocks) {
        const auto some = ~0ull >> (64 - (row_bytes - whole * 64));
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
            words[r] = _mm512_maskz_loadu_epi8(some, base + r * row_bytes + whole * 64);
        add_block(whole, words);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
        const float scale = kScales == Scales::row && weight.scales ? scales[r * weight.scale_stride] : 1.0f;
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) y[t * y_stride + r] = sum(sums[t][r]) * scale;
    }
}

template <int kTokens, Scales kScales>
inline void byte_rows(const Matrix& weight, const IntegerRow* x, int64_t begin, int64_t end, float* y,
                      int64_t y_stride) {
    constexpr int kRows = kTokens == 1 ? 4 : 2;  // rows of one tile share the loads of inputs
    int64_t n = begin;
    for (; n + kRows <= end; n += kRows) byte_tile<kTokens, kRows, kScales>(weight, x, n, y + (n - begin), y_stride);
    for (; n < end; ++n) byte_tile<kTokens, 1, kScales>(weight, x, n, y + (n - begin), y_stride);
}

}  // namespace nvtripy_portable::ISA

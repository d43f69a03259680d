// Products of int4 weights, made int16: words of 4 come apart by shifts.
#pragma once

#include "kernels.h"
#include "scales.h"
#include "simd.h"

namespace nvtripy_portable::ISA {

constexpr float kLargestForInt4 = 32767;

// Where input i of 8W stands: words come apart into elements q, q + 4, q + 8, ...
inline void arrange_for_int4(const int16_t* values, int16_t* to, int32_t*) {
    for (int start = 0; start < 128; start += 8 * W)
        for (int q = 0; q < 4; ++q)
            for (int i = 0; i < 2 * W; ++i) to[start + q * 2 * W + i] = values[start + 4 * i + q];
}

template <int kTokens, int kRows, Scales kScales>
inline void i4_block(const uint8_t* const* w, const int16_t* const* x, const float* x_scales,
                     const float* const* scales, F (&sums)[kTokens][kRows]) {
    constexpr int kChunk = 8 * W;
    I run[kTokens][kRows];
    for (int t = 0; t < kTokens; ++t)
        for (int r = 0; r < kRows; ++r) run[t][r] = zero_i();
#pragma GCC unroll 4
    for (int start = 0; start < 128; start += kChunk) {
        for (int r = 0; r < kRows; ++r) {
            const Nibbles row(w[r] + start / 2);
            for (int t = 0; t < kTokens; ++t) {
                const int16_t* from = x[t] + start;
                run[t][r] = dot(run[t][r], row.part0(), load_s(from));
                run[t][r] = dot(run[t][r], row.part1(), load_s(from + 2 * W));
                run[t][r] = dot(run[t][r], row.part2(), load_s(from + 4 * W));
                run[t][r] = dot(run[t][r], row.part3(), load_s(from + 6 * W));
            }
            if constexpr (kScales == Scales::group) {
                // Eight neighbouring elements meet in a lane, so four lanes share a scale.
                const F scale = spread(scales[r] + start / 32);
                for (int t = 0; t < kTokens; ++t) {
                    sums[t][r] = fma(to_float(run[t][r]), mul(scale, set1(x_scales[t])), sums[t][r]);
                    run[t][r] = zero_i();
                }
            }
        }
    }
    if constexpr (kScales != Scales::group)
        for (int r = 0; r < kRows; ++r)
            for (int t = 0; t < kTokens; ++t) {
                const float by = kScales == Scales::row ? x_scales[t] : x_scales[t] * scales[r][0];
                sums[t][r] = fma(to_float(run[t][r]), set1(by), sums[t][r]);
            }
}

}  // namespace nvtripy_portable::ISA

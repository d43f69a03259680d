// Products of int8 and int4 weights with inputs made int16, one scale for every 128: integer multiply-adds do twice the
// work of float ones, and the weights need no conversion. Rounding inputs to 16 bits of the largest in 128 loses less
// than float16 would.
//
// No sum overflows: 128 products of at most 2^15 * 2^7 are 2^29.
#pragma once

#include "kernels.h"
#include "products.h"
#include "simd.h"

namespace nvtripy_portable::ISA {

// What one row adds for 128 inputs. `begin` counts inputs, `scales` are the row's own blocks, groups of 32 a block.
// With kBlocks the row's scales are applied here, otherwise at the end.
template <int kTokens, int kRows, bool kBlocks>
inline void i8_block(const int8_t* const* w, const int16_t* const* x, const float* x_scales, const float* const* scales,
                     int64_t first_group, int64_t groups_per_block, F (&sums)[kTokens][kRows]) {
    constexpr int kRun = kBlocks ? 32 : 128;
#pragma GCC unroll 4
    for (int start = 0; start < 128; start += kRun) {
        I run[kTokens][kRows];
        for (int t = 0; t < kTokens; ++t)
            for (int r = 0; r < kRows; ++r) run[t][r] = zero_i();
#pragma GCC unroll 4
        for (int i = start; i < start + kRun; i += 2 * W) {
            for (int r = 0; r < kRows; ++r) {
                const S row = widen_i8(w[r] + i);
                for (int t = 0; t < kTokens; ++t) run[t][r] = dot(run[t][r], row, load_s(x[t] + i));
            }
        }
        for (int r = 0; r < kRows; ++r) {
            const float scale = kBlocks ? scales[r][(first_group + start / 32) / groups_per_block] : 1.0f;
            for (int t = 0; t < kTokens; ++t)
                sums[t][r] = fma(to_float(run[t][r]), set1(kBlocks ? x_scales[t] * scale : x_scales[t]), sums[t][r]);
        }
    }
}

template <int kTokens, int kRows, bool kBlocks>
inline void i4_block(const uint8_t* const* w, const int16_t* const* x, const float* x_scales,
                     const float* const* scales, int64_t first_group, int64_t groups_per_block,
                     F (&sums)[kTokens][kRows]) {
    constexpr int kChunk = 8 * W;
    const bool coarse = !kBlocks || groups_per_block % 4 == 0;
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
            if (!coarse) {
                // Eight neighbouring elements meet in a lane, so four lanes share a scale.
                float own[4] = {};
                for (int g = 0; g < kChunk / 32; ++g)
                    own[g] = scales[r][(first_group + start / 32 + g) / groups_per_block];
                const F scale = spread(own);
                for (int t = 0; t < kTokens; ++t) {
                    sums[t][r] = fma(to_float(run[t][r]), mul(scale, set1(x_scales[t])), sums[t][r]);
                    run[t][r] = zero_i();
                }
            }
        }
    }
    if (coarse)
        for (int r = 0; r < kRows; ++r) {
            const float scale = kBlocks ? scales[r][first_group / groups_per_block] : 1.0f;
            for (int t = 0; t < kTokens; ++t)
                sums[t][r] = fma(to_float(run[t][r]), set1(kBlocks ? x_scales[t] * scale : x_scales[t]), sums[t][r]);
        }
}

template <bool kInt4, int kTokens, int kRows, bool kBlocks>
inline void integer_tile(const Matrix& weight, const IntegerRow* x, int64_t n, float* y, int64_t y_stride) {
    constexpr int kBytes = kInt4 ? 64 : 128;  // of 128 weights
    const int64_t row_bytes = weight.row_bytes();
    const auto* base = static_cast<const uint8_t*>(weight.data) + n * row_bytes;
    const int64_t whole = weight.width / 128;
    const int64_t blocks = (weight.width + 127) / 128;
    const int64_t groups_per_block = kBlocks ? weight.block / 32 : 4;
    const float* scales[kRows] = {};
    if (kBlocks)
        for (int r = 0; r < kRows; ++r) scales[r] = weight.scales + (n + r) * weight.scale_stride;
    F sums[kTokens][kRows];
    for (int t = 0; t < kTokens; ++t)
        for (int r = 0; r < kRows; ++r) sums[t][r] = zero();

    auto block = [&](const uint8_t* const* w, int64_t b) {
        const int16_t* values[kTokens];
        float x_scales[kTokens];
        for (int t = 0; t < kTokens; ++t) {
            values[t] = x[t].values + b * 128;
            x_scales[t] = x[t].scales[b];
        }
        if constexpr (kInt4) {
            i4_block<kTokens, kRows, kBlocks>(w, values, x_scales, scales, b * 4, groups_per_block, sums);
        } else {
            const int8_t* numbers[kRows];
            for (int r = 0; r < kRows; ++r) numbers[r] = reinterpret_cast<const int8_t*>(w[r]);
            i8_block<kTokens, kRows, kBlocks>(numbers, values, x_scales, scales, b * 4, groups_per_block, sums);
        }
    };

    for (int64_t b = 0; b < whole; ++b) {
        const uint8_t* w[kRows];
        for (int r = 0; r < kRows; ++r) {
            w[r] = base + r * row_bytes + b * kBytes;
            prefetch(w[r] + kBytesAhead);
            if (!kInt4) prefetch(w[r] + kBytesAhead + 64);
        }
        block(w, b);
    }
    if (whole < blocks) {
        uint8_t last[kRows][kBytes] = {};
        const uint8_t* w[kRows];
        for (int r = 0; r < kRows; ++r) {
            std::memcpy(last[r], base + r * row_bytes + whole * kBytes, static_cast<size_t>(row_bytes - whole * kBytes));
            w[r] = last[r];
        }
        if (kBlocks) {
            // The last 128 inputs may have fewer groups than four; the row's scales end with the last that exists.
            float own[kRows][4];
            for (int r = 0; r < kRows; ++r) {
                for (int64_t g = 0; g < 4; ++g)
                    own[r][g] = scales[r][smaller((whole * 4 + g) / groups_per_block, weight.scale_stride - 1)];
                scales[r] = own[r];
            }
            const int16_t* values[kTokens];
            float x_scales[kTokens];
            for (int t = 0; t < kTokens; ++t) {
                values[t] = x[t].values + whole * 128;
                x_scales[t] = x[t].scales[whole];
            }
            if constexpr (kInt4) {
                i4_block<kTokens, kRows, kBlocks>(w, values, x_scales, scales, 0, 1, sums);
            } else {
                const int8_t* numbers[kRows];
                for (int r = 0; r < kRows; ++r) numbers[r] = reinterpret_cast<const int8_t*>(w[r]);
                i8_block<kTokens, kRows, kBlocks>(numbers, values, x_scales, scales, 0, 1, sums);
            }
        } else {
            block(w, whole);
        }
    }
    for (int r = 0; r < kRows; ++r) {
        const float scale = !kBlocks && weight.scales ? weight.scales[(n + r) * weight.scale_stride] : 1.0f;
        for (int t = 0; t < kTokens; ++t) y[t * y_stride + r] = sum(sums[t][r]) * scale;
    }
}

template <bool kInt4, int kTokens, bool kBlocks>
inline void integer_rows(const Matrix& weight, const IntegerRow* x, int64_t begin, int64_t end, float* y,
                         int64_t y_stride) {
    constexpr int kRows = kTokens > 1 && W == 16 ? 2 : 1;  // one row at a time is read fastest
    int64_t n = begin;
    for (; n + kRows <= end; n += kRows)
        integer_tile<kInt4, kTokens, kRows, kBlocks>(weight, x, n, y + (n - begin), y_stride);
    for (; n < end; ++n) integer_tile<kInt4, kTokens, 1, kBlocks>(weight, x, n, y + (n - begin), y_stride);
}

template <bool kInt4, bool kBlocks>
inline void integer_tokens(const Matrix& weight, const IntegerRow* x, int64_t tokens, int64_t begin, int64_t end,
                           float* y, int64_t y_stride) {
    switch (tokens) {
        case 1: integer_rows<kInt4, 1, kBlocks>(weight, x, begin, end, y, y_stride); break;
        case 2: integer_rows<kInt4, 2, kBlocks>(weight, x, begin, end, y, y_stride); break;
        case 3: integer_rows<kInt4, 3, kBlocks>(weight, x, begin, end, y, y_stride); break;
        default: integer_rows<kInt4, 4, kBlocks>(weight, x, begin, end, y, y_stride); break;
    }
}

inline void integer_products(const Matrix& weight, const IntegerRow* x, int64_t tokens, int64_t begin, int64_t end,
                             float* y, int64_t y_stride) {
    const bool int4 = weight.dtype == Dtype::i4;
    if (weight.block) {
        if (int4) integer_tokens<true, true>(weight, x, tokens, begin, end, y, y_stride);
        else integer_tokens<false, true>(weight, x, tokens, begin, end, y, y_stride);
    } else {
        if (int4) integer_tokens<true, false>(weight, x, tokens, begin, end, y, y_stride);
        else integer_tokens<false, false>(weight, x, tokens, begin, end, y, y_stride);
    }
}

}  // namespace nvtripy_portable::ISA

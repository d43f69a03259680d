// Products of int8 and int4 weights, made int16, with inputs of 16 bits; of int4 weights on AVX-512 as int4_bytes.h has it.
#pragma once

#include "kernels.h"
#include "products.h"
#include "scales.h"
#include "simd.h"

#if ISA_NUMBER(ISA) == 3
#include "int4_bytes.h"
#else
#include "int4_words.h"
#endif

namespace nvtripy_portable::ISA {

constexpr float kLargestForInt8 = 32767;
constexpr float kUnitOfInt4 = 1;  // of sums of int4 weights

inline void arrange_for_int8(const int16_t* values, int16_t* to) { std::memcpy(to, values, 128 * sizeof *to); }

// What one row adds for 128 inputs; `scales` are those of the row's 128 weights: one, or four.
template <int kTokens, int kRows, Scales kScales>
inline void i8_block(const int8_t* const* w, const int16_t* const* x, const float* x_scales, const float* const* scales,
                     F (&sums)[kTokens][kRows]) {
    constexpr int kRun = kScales == Scales::group ? 32 : 128;
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
            for (int t = 0; t < kTokens; ++t) {
                const float by = kScales == Scales::row ? x_scales[t] : x_scales[t] * scales[r][start / 32];
                sums[t][r] = fma(to_float(run[t][r]), set1(by), sums[t][r]);
            }
        }
    }
}

template <bool kInt4, int kTokens, int kRows, Scales kScales>
inline void integer_tile(const Matrix& weight, const IntegerRow* x, int64_t n, float* y, int64_t y_stride) {
    constexpr int kBytes = kInt4 ? 64 : 128;  // of 128 weights
    const int64_t row_bytes = weight.row_bytes();
    const auto* base = static_cast<const uint8_t*>(weight.data) + n * row_bytes;
    const int64_t whole = weight.width / 128;
    const int64_t blocks = (weight.width + 127) / 128;
    F sums[kTokens][kRows];
    for (int t = 0; t < kTokens; ++t)
        for (int r = 0; r < kRows; ++r) sums[t][r] = zero();

    for (int64_t b = 0; b < blocks; ++b) {
        const uint8_t* w[kRows];
        const float* scales[kRows] = {};
        float groups[kRows][4];
        uint8_t last[kRows][kBytes];
        for (int r = 0; r < kRows; ++r) {
            w[r] = base + r * row_bytes + b * kBytes;
            prefetch_once(w[r] + bytes_ahead());
            if (!kInt4) prefetch_once(w[r] + bytes_ahead() + 64);
            if (b == whole) {  // the rest of a row, with zeros
                std::memset(last[r], 0, kBytes);
                std::memcpy(last[r], w[r], static_cast<size_t>(row_bytes - whole * kBytes));
                w[r] = last[r];
            }
            const float* own = weight.scales + (n + r) * weight.scale_stride;
            if constexpr (kScales == Scales::block) scales[r] = own + b;
            if constexpr (kScales == Scales::group) {
                // The last 128 inputs may have fewer groups than four.
                if (weight.block == 32 && b * 4 + 4 <= weight.scale_stride) {
                    scales[r] = own + b * 4;
                } else {
                    for (int64_t g = 0; g < 4; ++g)
                        groups[r][g] = own[group_scale(b * 4 + g, weight.block, weight.scale_stride)];
                    scales[r] = groups[r];
                }
            }
        }
        const int16_t* values[kTokens];
        float x_scales[kTokens];
        for (int t = 0; t < kTokens; ++t) {
            values[t] = x[t].values + b * 128;
            x_scales[t] = x[t].scales[b];
        }
        if constexpr (kInt4) {
            i4_block<kTokens, kRows, kScales>(w, values, x_scales, scales, sums);
        } else {
            const int8_t* numbers[kRows];
            for (int r = 0; r < kRows; ++r) numbers[r] = reinterpret_cast<const int8_t*>(w[r]);
            i8_block<kTokens, kRows, kScales>(numbers, values, x_scales, scales, sums);
        }
    }
    for (int r = 0; r < kRows; ++r) {
        const float scale =
            kScales == Scales::row && weight.scales ? weight.scales[(n + r) * weight.scale_stride] : 1.0f;
        for (int t = 0; t < kTokens; ++t) y[t * y_stride + r] = sum(sums[t][r]) * scale;
    }
}

template <bool kInt4, int kTokens, Scales kScales>
inline void integer_rows(const Matrix& weight, const IntegerRow* x, int64_t begin, int64_t end, float* y,
                         int64_t y_stride) {
    constexpr int kRows = kTokens > 1 && W == 16 ? 2 : 1;  // one row at a time is read fastest
    int64_t n = begin;
#if ISA_NUMBER(ISA) == 3
    if constexpr (kInt4) byte_rows<kTokens, kScales>(weight, x, begin, end, y, y_stride);
    else
#endif
    {
        for (; n + kRows <= end; n += kRows)
            integer_tile<kInt4, kTokens, kRows, kScales>(weight, x, n, y + (n - begin), y_stride);
        for (; n < end; ++n) integer_tile<kInt4, kTokens, 1, kScales>(weight, x, n, y + (n - begin), y_stride);
    }
}

}  // namespace nvtripy_portable::ISA

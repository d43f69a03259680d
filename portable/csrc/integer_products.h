// Products of int8 and int4 weights with inputs made int16, one scale for every 128: integer multiply-adds do twice the
// work of float ones, and the weights need no conversion. Rounding inputs to 16 bits of the largest in 128 loses less
// than float16 would.
//
// No sum overflows: 128 products of at most 2^15 * 2^7 are 2^29.
#pragma once

#include "kernels.h"
#include "products.h"
#include "scales.h"
#include "simd.h"

#if ISA_BYTES
#include "byte_products.h"
#else
#include "integer_words.h"
#endif

namespace nvtripy_portable::ISA {

// Row t of those that are x_stride floats apart.
inline IntegerRow integer_row_at(IntegerRow x, int64_t x_stride, int64_t t) {
    return {x.values + t * x_stride * 2, x.scales + t * x_stride, x.begin + t * x_stride};
}

// More tokens than 4 meet a few rows at a time, which stay in the first-level cache meanwhile. A token's sum does not know.
template <bool kInt4, Scales kScales>
inline void integer_tokens(const Matrix& weight, IntegerRow x, int64_t x_stride, int64_t tokens, int64_t begin, int64_t end,
                           float* y, int64_t y_stride) {
    constexpr int64_t kRowsTogether = 8;
    const int64_t together = tokens > kFewTokens ? kRowsTogether : end - begin;
    for (int64_t n = begin; n < end; n += together) {
        const int64_t to = smaller(n + together, end);
        for (int64_t t = 0; t < tokens; t += kFewTokens) {
            IntegerRow rows[kFewTokens];
            const int64_t count = smaller<int64_t>(kFewTokens, tokens - t);
            for (int64_t i = 0; i < count; ++i) rows[i] = integer_row_at(x, x_stride, t + i);
            float* here = y + t * y_stride + (n - begin);
            switch (count) {
                case 1: integer_rows<kInt4, 1, kScales>(weight, rows, n, to, here, y_stride); break;
                case 2: integer_rows<kInt4, 2, kScales>(weight, rows, n, to, here, y_stride); break;
                case 3: integer_rows<kInt4, 3, kScales>(weight, rows, n, to, here, y_stride); break;
                default: integer_rows<kInt4, 4, kScales>(weight, rows, n, to, here, y_stride); break;
            }
        }
    }
}

inline void integer_products(const Matrix& weight, IntegerRow x, int64_t x_stride, int64_t tokens, int64_t begin,
                             int64_t end, float* y, int64_t y_stride) {
    const bool int4 = weight.dtype == Dtype::i4;
    if (!weight.block) {
        if (int4) integer_tokens<true, Scales::row>(weight, x, x_stride, tokens, begin, end, y, y_stride);
        else integer_tokens<false, Scales::row>(weight, x, x_stride, tokens, begin, end, y, y_stride);
    } else if (weight.block == 128) {
        if (int4) integer_tokens<true, Scales::block>(weight, x, x_stride, tokens, begin, end, y, y_stride);
        else integer_tokens<false, Scales::block>(weight, x, x_stride, tokens, begin, end, y, y_stride);
    } else {
        if (int4) integer_tokens<true, Scales::group>(weight, x, x_stride, tokens, begin, end, y, y_stride);
        else integer_tokens<false, Scales::group>(weight, x, x_stride, tokens, begin, end, y, y_stride);
    }
}

}  // namespace nvtripy_portable::ISA

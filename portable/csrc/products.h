// Products of float32 rows with rows of weights, for generated tokens. Up to 4 of them meet the weights as these are stored,
// which are read once; up to 8 meet a few rows at a time, which stay in the first-level cache meanwhile; for more, 12 rows at a time are widened to float32 in a buffer that fits the first-level cache, and
// meet all tokens there.
//
// Either way a row's sum is the same to the last bit: it runs along both rows, 2W numbers at a time, for kPanelWidth numbers;
// what its 2W lanes come to is added to the sum of the numbers before. So weights need no transposition, and there are two
// chains of additions for one token and one row: memory is read fastest from end to end, one row behind the other.
#pragma once

#include "dequantize.h"
#include "kernels.h"
#include "simd.h"

namespace nvtripy_portable::ISA {

#if ISA_NUMBER(ISA) == 3
constexpr int kTokensTogether = 3, kTileRows = 4;  // two sums each: 24 of 32 registers
#else
constexpr int kTokensTogether = 3, kTileRows = 2;  // 12 of 16 registers
#endif
static_assert(kPanelRows % kTileRows == 0);
constexpr int kFewTokens = 4, kSomeTokens = 8;

// What lanes have come to, added to the sum of the numbers before.
inline float added(float before, const F (&lanes)[2]) { return before + sum(add(lanes[0], lanes[1])); }

// y[t, r] = x[t] . panel[r] for `width` numbers, a multiple of 2W; or y += that.
template <int kTokens, int kRows>
inline void tile(const float* x, int64_t x_stride, const float* panel, int64_t width, float* y, int64_t y_stride,
                 bool add_to) {
    F sums[kTokens][kRows][2];
    for (int t = 0; t < kTokens; ++t)
        for (int r = 0; r < kRows; ++r) sums[t][r][0] = sums[t][r][1] = zero();
    for (int64_t k = 0; k < width; k += 2 * W) {
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            F rows[kRows];
            for (int r = 0; r < kRows; ++r) rows[r] = load(panel + r * kPanelWidth + k + i * W);
            for (int t = 0; t < kTokens; ++t) {
                const F token = load(x + t * x_stride + k + i * W);
                for (int r = 0; r < kRows; ++r) sums[t][r][i] = fma(token, rows[r], sums[t][r][i]);
            }
        }
    }
    for (int t = 0; t < kTokens; ++t) {
#if ISA_NUMBER(ISA) == 3
        if constexpr (kRows == 4) {
            F lanes[4];
            for (int r = 0; r < 4; ++r) lanes[r] = add(sums[t][r][0], sums[t][r][1]);
            add_four(y + t * y_stride, sum_four(lanes), add_to);
            continue;
        }
#endif
        for (int r = 0; r < kRows; ++r) {
            float* to = y + t * y_stride + r;
            *to = added(add_to ? *to : 0.0f, sums[t][r]);
        }
    }
}

template <int kRows>
inline void tiles(const float* x, int64_t x_stride, int64_t tokens, const float* panel, int64_t width, float* y,
                  int64_t y_stride, bool add_to) {
    switch (tokens) {
        case 1: tile<1, kRows>(x, x_stride, panel, width, y, y_stride, add_to); break;
        case 2: tile<2, kRows>(x, x_stride, panel, width, y, y_stride, add_to); break;
        case 3: tile<3, kRows>(x, x_stride, panel, width, y, y_stride, add_to); break;
        default: tile<4, kRows>(x, x_stride, panel, width, y, y_stride, add_to); break;
    }
}

// Scales of blocks belong to the numbers; one for a row to its sum.
inline bool scales_numbers(const Matrix& weight) { return weight.block || weight.dtype == Dtype::i4; }

__attribute__((always_inline)) inline void prefetch_later(const void* p) { __builtin_prefetch(p, 0, 2); }

inline void panel_products(const Matrix& weight, const float* x, int64_t x_stride, int64_t tokens, int64_t begin,
                           int64_t end, float* y, int64_t y_stride, float* panel) {
    Matrix numbers = weight;
    const int64_t row_bytes = weight.row_bytes();
    if (!scales_numbers(weight)) numbers.scales = nullptr;
    // Panel by panel along the rows, so that memory is read nearly from end to end; the inputs stay in the second-level cache.
    for (int64_t n = begin; n < end; n += kPanelRows) {
        const int64_t rows = smaller(kPanelRows, end - n);
        for (int64_t k = 0; k < weight.width; k += kPanelWidth) {
            const int64_t width = smaller(kPanelWidth, weight.width - k);
            const int64_t padded = (width + 2 * W - 1) / (2 * W) * (2 * W);
            for (int64_t r = 0; r < rows; ++r) {
                // The next panel's, which is wanted when all tokens have met this one.
                const auto* next = static_cast<const char*>(weight.data) + (n + kPanelRows + r) * row_bytes + k * row_bytes / weight.width;
                for (int64_t i = 0; i < width * row_bytes / weight.width; i += 64) prefetch_later(next + i);
                dequantize(numbers, n + r, k, width, panel + r * kPanelWidth);
                for (int64_t i = width; i < padded; ++i) panel[r * kPanelWidth + i] = 0;
            }
            for (int64_t t = 0; t < tokens; t += kTokensTogether) {
                const int64_t some = smaller<int64_t>(kTokensTogether, tokens - t);
                const float* from = x + t * x_stride + k;
                float* to = y + t * y_stride + (n - begin);
                int64_t r = 0;
                for (; r + kTileRows <= rows; r += kTileRows)
                    tiles<kTileRows>(from, x_stride, some, panel + r * kPanelWidth, padded, to + r, y_stride, k > 0);
                for (; r < rows; ++r)
                    tiles<1>(from, x_stride, some, panel + r * kPanelWidth, padded, to + r, y_stride, k > 0);
            }
        }
    }
}

// y[t] = x[t] . w for a stored row.
template <class Numbers, int kTokens>
inline void direct_row(const typename Numbers::Stored* w, int64_t width, const float* x, int64_t x_stride, float* y,
                       int64_t y_stride) {
    using Stored = typename Numbers::Stored;
    constexpr int kLine = 64 / static_cast<int>(sizeof(Stored));  // numbers in a cache line
    constexpr int kStep = larger(kLine, 2 * W);
    float before[kTokens];
    for (int t = 0; t < kTokens; ++t) before[t] = 0;
    for (int64_t begin = 0; begin < width; begin += kPanelWidth) {
        const int64_t end = smaller(begin + kPanelWidth, width);
        F sums[kTokens][2];
        for (int t = 0; t < kTokens; ++t) sums[t][0] = sums[t][1] = zero();
        const auto add_two = [&](const F(&row)[2], int64_t k) __attribute__((always_inline)) {
#pragma GCC unroll 2
            for (int i = 0; i < 2; ++i)
                for (int t = 0; t < kTokens; ++t) sums[t][i] = fma(load(x + t * x_stride + k + i * W), row[i], sums[t][i]);
        };
        int64_t k = begin;
        F row[2];
        for (; k + kStep <= end; k += kStep) {
            for (int i = 0; i < kStep; i += kLine)
                prefetch_once(w + k + i + bytes_ahead() / static_cast<int>(sizeof(Stored)));
#pragma GCC unroll 4
            for (int i = 0; i < kStep; i += 2 * W) {
                load_two<Numbers>(w + k + i, row);
                add_two(row, k + i);
            }
        }
        // The inputs go on with zeros to a multiple of 2W, or more.
        for (; k < end; k += 2 * W) {
            for (int i = 0; i < 2; ++i) {
                const int64_t rest = end - k - i * W;
                row[i] = rest >= W ? Numbers::load(w + k + i * W) : rest > 0 ? load_part<Numbers>(w + k + i * W, rest) : zero();
            }
            add_two(row, k);
        }
#if ISA_NUMBER(ISA) == 3
        if constexpr (kTokens == 4) {
            F lanes[4];
            for (int t = 0; t < 4; ++t) lanes[t] = add(sums[t][0], sums[t][1]);
            add_four(before, sum_four(lanes), true);
            continue;
        }
#endif
        for (int t = 0; t < kTokens; ++t) before[t] = added(before[t], sums[t]);
    }
    for (int t = 0; t < kTokens; ++t) y[t * y_stride] = before[t] * Numbers::kFactor;
}

template <class Numbers, int kTokens>
inline void direct_products(const Matrix& weight, const float* x, int64_t x_stride, int64_t begin, int64_t end,
                            float* y, int64_t y_stride) {
    const auto* w = static_cast<const typename Numbers::Stored*>(weight.data);
    for (int64_t n = begin; n < end; ++n)
        direct_row<Numbers, kTokens>(w + n * weight.width, weight.width, x, x_stride, y + (n - begin), y_stride);
}

template <class Numbers>
inline void few_products(const Matrix& weight, const float* x, int64_t x_stride, int64_t tokens, int64_t begin,
                         int64_t end, float* y, int64_t y_stride) {
    constexpr int64_t kRowsTogether = 8;
    if (tokens > kFewTokens) {
        for (int64_t n = begin; n < end; n += kRowsTogether)
            for (int64_t t = 0; t < tokens; t += kFewTokens)
                few_products<Numbers>(weight, x + t * x_stride, x_stride, smaller<int64_t>(kFewTokens, tokens - t), n,
                                      smaller(n + kRowsTogether, end), y + t * y_stride + (n - begin), y_stride);
        return;
    }
    switch (tokens) {
        case 1: direct_products<Numbers, 1>(weight, x, x_stride, begin, end, y, y_stride); break;
        case 2: direct_products<Numbers, 2>(weight, x, x_stride, begin, end, y, y_stride); break;
        case 3: direct_products<Numbers, 3>(weight, x, x_stride, begin, end, y, y_stride); break;
        default: direct_products<Numbers, 4>(weight, x, x_stride, begin, end, y, y_stride); break;
    }
}

inline void products(const Matrix& weight, const float* x, int64_t x_stride, int64_t tokens, int64_t begin,
                     int64_t end, float* y, int64_t y_stride, float* panel) {
    if (tokens > kSomeTokens || scales_numbers(weight)) {
        panel_products(weight, x, x_stride, tokens, begin, end, y, y_stride, panel);
    } else {
        switch (weight.dtype) {
            case Dtype::f32: few_products<F32>(weight, x, x_stride, tokens, begin, end, y, y_stride); break;
            case Dtype::f16: few_products<F16>(weight, x, x_stride, tokens, begin, end, y, y_stride); break;
            case Dtype::bf16: few_products<BF16>(weight, x, x_stride, tokens, begin, end, y, y_stride); break;
            case Dtype::i8: few_products<I8>(weight, x, x_stride, tokens, begin, end, y, y_stride); break;
            default:
                if (weight.has_nan) few_products<F8WithNaN>(weight, x, x_stride, tokens, begin, end, y, y_stride);
                else few_products<F8>(weight, x, x_stride, tokens, begin, end, y, y_stride);
                break;
        }
    }
    if (!weight.scales || scales_numbers(weight)) return;
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t n = begin; n < end; ++n)
            y[t * y_stride + n - begin] *= weight.scales[n * weight.scale_stride];
}

}  // namespace nvtripy_portable::ISA

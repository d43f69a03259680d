// Products of float32 rows with rows of weights, one function for both shapes of the problem:
// - up to 4 tokens (decode): the weights are read once, as they are stored, several rows side by side;
// - more (prefill): 12 rows at a time are widened to float32 in a buffer that fits the first-level cache, and meet all
//   tokens there.
// Either way a sum runs along both rows, W numbers at a time, so weights need no transposition.
#pragma once

#include "dequantize.h"
#include "kernels.h"
#include "simd.h"

namespace nvtripy_portable::ISA {

#if ISA_NUMBER(ISA) == 3
constexpr int kTileRows = 6;  // with 4 tokens: 24 of 32 registers are sums
#else
constexpr int kTileRows = 3;  // with 4 tokens: 12 of 16 registers are sums
#endif
static_assert(kPanelRows % kTileRows == 0);

// y[t, r] = x[t] . panel[r] for `width` numbers, a multiple of W; or y += that.
template <int kTokens, int kRows>
inline void tile(const float* x, int64_t x_stride, const float* panel, int64_t width, float* y, int64_t y_stride,
                 bool add_to) {
    F sums[kTokens][kRows];
    for (int t = 0; t < kTokens; ++t)
        for (int r = 0; r < kRows; ++r) sums[t][r] = zero();
    for (int64_t k = 0; k < width; k += W) {
        F rows[kRows];
        for (int r = 0; r < kRows; ++r) rows[r] = load(panel + r * kPanelWidth + k);
        for (int t = 0; t < kTokens; ++t) {
            const F token = load(x + t * x_stride + k);
            for (int r = 0; r < kRows; ++r) sums[t][r] = fma(token, rows[r], sums[t][r]);
        }
    }
    for (int t = 0; t < kTokens; ++t)
        for (int r = 0; r < kRows; ++r) {
            float* to = y + t * y_stride + r;
            *to = (add_to ? *to : 0.0f) + sum(sums[t][r]);
        }
}

template <int kRows>
inline void tiles(const float* x, int64_t x_stride, int64_t tokens, const float* panel, int64_t width, float* y,
                  int64_t y_stride, bool add_to) {
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4)
        tile<4, kRows>(x + t * x_stride, x_stride, panel, width, y + t * y_stride, y_stride, add_to);
    x += t * x_stride;
    y += t * y_stride;
    switch (tokens - t) {
        case 3: tile<3, kRows>(x, x_stride, panel, width, y, y_stride, add_to); break;
        case 2: tile<2, kRows>(x, x_stride, panel, width, y, y_stride, add_to); break;
        case 1: tile<1, kRows>(x, x_stride, panel, width, y, y_stride, add_to); break;
        default: break;
    }
}

inline void panel_products(const Matrix& weight, const float* x, int64_t x_stride, int64_t tokens, int64_t begin,
                           int64_t end, float* y, int64_t y_stride, float* panel) {
    // The inputs' slice of 512 columns stays in the second-level cache while all panels meet it.
    for (int64_t k = 0; k < weight.width; k += kPanelWidth) {
        const int64_t width = smaller(kPanelWidth, weight.width - k);
        const int64_t padded = (width + W - 1) / W * W;
        for (int64_t n = begin; n < end; n += kPanelRows) {
            const int64_t rows = smaller(kPanelRows, end - n);
            for (int64_t r = 0; r < rows; ++r) {
                dequantize(weight, n + r, k, width, panel + r * kPanelWidth);
                for (int64_t i = width; i < padded; ++i) panel[r * kPanelWidth + i] = 0;
            }
            for (int64_t t = 0; t < tokens; t += 4) {
                const int64_t some = smaller<int64_t>(4, tokens - t);
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

// y[t, r] = x[t] . w[r] for kRows stored rows that lie one behind the other. Memory is read fastest from end to end: with
// one or two tokens there is one row at a time, and more sums for each token instead, to keep the multipliers busy.
template <class Numbers, int kTokens, int kRows>
inline void direct_tile(const typename Numbers::Stored* w, int64_t width, const float* x, int64_t x_stride, float* y,
                        int64_t y_stride) {
    using Stored = typename Numbers::Stored;
    constexpr int kLine = 64 / static_cast<int>(sizeof(Stored));  // numbers in a cache line
    constexpr int kSums = kTokens * kRows == 1 ? 4 : kTokens * kRows == 2 ? 2 : 1;
    constexpr int kStep = larger(kLine, larger(kSums, 2) * W);
    F sums[kTokens][kRows][kSums];
    for (int t = 0; t < kTokens; ++t)
        for (int r = 0; r < kRows; ++r)
            for (int s = 0; s < kSums; ++s) sums[t][r][s] = zero();
    int64_t k = 0;
    for (; k + kStep <= width; k += kStep) {
        for (int r = 0; r < kRows; ++r)
            for (int i = 0; i < kStep; i += kLine)
                prefetch_once(w + r * width + k + i + kBytesAhead / static_cast<int>(sizeof(Stored)));
#pragma GCC unroll 8
        for (int i = 0; i < kStep; i += 2 * W) {
            for (int r = 0; r < kRows; ++r) {
                F row[2];
                load_two<Numbers>(w + r * width + k + i, row);
#pragma GCC unroll 2
                for (int j = 0; j < 2; ++j)
                    for (int t = 0; t < kTokens; ++t) {
                        F& to = sums[t][r][(i / W + j) % kSums];
                        to = fma(load(x + t * x_stride + k + i + j * W), row[j], to);
                    }
            }
        }
    }
    for (; k + W <= width; k += W)
        for (int r = 0; r < kRows; ++r) {
            const F row = Numbers::load(w + r * width + k);
            for (int t = 0; t < kTokens; ++t)
                sums[t][r][0] = fma(load(x + t * x_stride + k), row, sums[t][r][0]);
        }
    if (k < width)
        for (int r = 0; r < kRows; ++r) {
            const F row = load_part<Numbers>(w + r * width + k, width - k);
            for (int t = 0; t < kTokens; ++t)
                sums[t][r][0] = fma(load(x + t * x_stride + k), row, sums[t][r][0]);
        }
    for (int t = 0; t < kTokens; ++t)
        for (int r = 0; r < kRows; ++r) {
            F total = sums[t][r][0];
            for (int s = 1; s < kSums; ++s) total = add(total, sums[t][r][s]);
            y[t * y_stride + r] = sum(total);
        }
}

template <class Numbers, int kTokens>
inline void direct_products(const Matrix& weight, const float* x, int64_t x_stride, int64_t begin, int64_t end,
                            float* y, int64_t y_stride) {
    constexpr int kRows = 1;
    const auto* w = static_cast<const typename Numbers::Stored*>(weight.data);
    int64_t n = begin;
    for (; n + kRows <= end; n += kRows)
        direct_tile<Numbers, kTokens, kRows>(w + n * weight.width, weight.width, x, x_stride, y + (n - begin), y_stride);
    for (; n < end; ++n)
        direct_tile<Numbers, kTokens, 1>(w + n * weight.width, weight.width, x, x_stride, y + (n - begin), y_stride);
    if (!weight.scales && Numbers::kFactor == 1) return;
    for (int t = 0; t < kTokens; ++t)
        for (n = begin; n < end; ++n)
            y[t * y_stride + n - begin] *=
                Numbers::kFactor * (weight.scales ? weight.scales[n * weight.scale_stride] : 1.0f);
}

template <class Numbers>
inline void few_products(const Matrix& weight, const float* x, int64_t x_stride, int64_t tokens, int64_t begin,
                         int64_t end, float* y, int64_t y_stride) {
    switch (tokens) {
        case 1: direct_products<Numbers, 1>(weight, x, x_stride, begin, end, y, y_stride); break;
        case 2: direct_products<Numbers, 2>(weight, x, x_stride, begin, end, y, y_stride); break;
        case 3: direct_products<Numbers, 3>(weight, x, x_stride, begin, end, y, y_stride); break;
        default: direct_products<Numbers, 4>(weight, x, x_stride, begin, end, y, y_stride); break;
    }
}

inline void products(const Matrix& weight, const float* x, int64_t x_stride, int64_t tokens, int64_t begin,
                     int64_t end, float* y, int64_t y_stride, float* panel) {
    if (tokens > 4 || weight.block || weight.dtype == Dtype::i4) {
        panel_products(weight, x, x_stride, tokens, begin, end, y, y_stride, panel);
        return;
    }
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

}  // namespace nvtripy_portable::ISA

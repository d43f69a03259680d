// Products with two small matrices, the way from a row to its adapter's few numbers and back (LoRA).
#pragma once

#include "kernels.h"
#include "simd.h"

namespace nvtripy_portable::ISA {

// t[k, r] = x[k] . down[r], for the first `Rows` rows k. Each sum is taken in one order, whatever Rows is.
template <class Numbers, int Rows>
inline void to_few(const LowRank& matrices, const typename Numbers::Stored* down, const float* x, int64_t x_stride, float* t) {
    const int64_t width = matrices.width, rank = matrices.rank;
    for (int64_t r = 0; r < rank; ++r, down += width) {
        F sums[Rows][2];
        for (int k = 0; k < Rows; ++k) sums[k][0] = sums[k][1] = set1(0);
        int64_t i = 0;
        for (; i + 2 * W <= width; i += 2 * W) {
            const F first = Numbers::load(down + i), second = Numbers::load(down + i + W);
            for (int k = 0; k < Rows; ++k) {
                sums[k][0] = fma(load(x + k * x_stride + i), first, sums[k][0]);
                sums[k][1] = fma(load(x + k * x_stride + i + W), second, sums[k][1]);
            }
        }
        for (; i < width; i += W) {
            const int64_t count = smaller<int64_t>(W, width - i);
            const F part = load_part<Numbers>(down + i, count);
            for (int k = 0; k < Rows; ++k) sums[k][0] = fma(load_part<F32>(x + k * x_stride + i, count), part, sums[k][0]);
        }
        for (int k = 0; k < Rows; ++k) t[k * rank + r] = sum(add(sums[k][0], sums[k][1]));
    }
}

// y[k] = t[k] . up, likewise.
template <class Numbers, int Rows>
inline void from_few(const LowRank& matrices, const typename Numbers::Stored* up, const float* t, float* y) {
    const int64_t outputs = matrices.outputs, rank = matrices.rank;
    for (int64_t n = 0; n < outputs; n += W) {
        const int64_t count = smaller<int64_t>(W, outputs - n);
        F sums[Rows];
        for (int k = 0; k < Rows; ++k) sums[k] = set1(0);
        for (int64_t r = 0; r < rank; ++r) {
            const typename Numbers::Stored* from = up + r * outputs + n;
            const F part = count == W ? Numbers::load(from) : load_part<Numbers>(from, count);
            for (int k = 0; k < Rows; ++k) sums[k] = fma(set1(t[k * rank + r]), part, sums[k]);
        }
        for (int k = 0; k < Rows; ++k) {
            if (count == W) store(y + k * outputs + n, sums[k]);
            else store_part(y + k * outputs + n, sums[k], count);
        }
    }
}

template <class Numbers>
inline void low_rank_of(const LowRank& matrices, const float* x, int64_t x_stride, int64_t rows, float* y, float* few) {
    const auto* down = static_cast<const typename Numbers::Stored*>(matrices.down);
    const auto* up = static_cast<const typename Numbers::Stored*>(matrices.up);
    switch (rows) {
        case 1: to_few<Numbers, 1>(matrices, down, x, x_stride, few); from_few<Numbers, 1>(matrices, up, few, y); break;
        case 2: to_few<Numbers, 2>(matrices, down, x, x_stride, few); from_few<Numbers, 2>(matrices, up, few, y); break;
        case 3: to_few<Numbers, 3>(matrices, down, x, x_stride, few); from_few<Numbers, 3>(matrices, up, few, y); break;
        default: to_few<Numbers, 4>(matrices, down, x, x_stride, few); from_few<Numbers, 4>(matrices, up, few, y); break;
    }
}

inline void low_rank(const LowRank& matrices, const float* x, int64_t x_stride, int64_t rows, float* y, float* few) {
    switch (matrices.dtype) {
        case Dtype::f16: low_rank_of<F16>(matrices, x, x_stride, rows, y, few); break;
        case Dtype::bf16: low_rank_of<BF16>(matrices, x, x_stride, rows, y, few); break;
        default: low_rank_of<F32>(matrices, x, x_stride, rows, y, few); break;
    }
}

}  // namespace nvtripy_portable::ISA

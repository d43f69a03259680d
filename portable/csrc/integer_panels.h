// As float_panels.h, for int8 and int4 weights with inputs made int16. The sums of a block of inputs, or of a block of weights
// where those are shorter, become float32 and get their scales.
//
// No sum overflows: 128 products of at most 2^15 * 2^7 are 2^29.
#pragma once

#include "float_panels.h"
#include "input_stage.h"
#include "kernels.h"
#include "simd.h"

#if ISA_BYTES
#include "panel_bytes.h"
#else
#include "panel_pairs.h"
#endif

namespace nvtripy_portable::ISA {

static_assert(kPanelDepth == kInputBlock);

inline void integer_panels(const Matrix& weight, IntegerRow x, int64_t x_stride, int64_t tokens, int64_t begin,
                           int64_t end, float* y, int64_t y_stride, float* scratch) {
    auto* panel = reinterpret_cast<int16_t*>(scratch);
    float* sums = scratch + kPanelColumns * kPanelDepth;
    const int64_t columns = end - begin;
    // Weights under one scale that lie in one block of inputs.
    int64_t run = kPanelDepth;
    while (weight.block % run != 0) run /= 2;
    alignas(64) float scales[kPanelColumns];
    for (int64_t c = 0; c < kPanelColumns; ++c) scales[c] = 1;
    for (int64_t k = 0; k < weight.width; k += kPanelDepth) {
        fill_integer_panel(weight, begin, end, k / kPanelDepth, panel);
        for (int64_t from = k; from < smaller(k + kPanelDepth, weight.width); from += run) {
            if (weight.block)
                for (int64_t c = 0; c < columns; ++c)
                    scales[c] = weight.scales[(begin + c) * weight.scale_stride + from / weight.block];
            for (int64_t t = 0; t < tokens; t += kIntegerTokens) {
                const int64_t count = smaller<int64_t>(kIntegerTokens, tokens - t);
                if (from == k)
                    prefetch_part(weight, begin + t * columns / tokens, begin + (t + count) * columns / tokens,
                                  k + kPanelDepth);
                for (int64_t c = 0; c < columns; c += kIntegerColumns)
                    integer_tiles(count, x.values + t * x_stride * 2 + from,
                                  x.scales + t * x_stride + k / kPanelDepth, x_stride,
                                  panel + integer_panel_offset(c) + (from - k) * kIntegerStep, run / 2, scales + c,
                                  sums + t * kPanelColumns + c, from > 0);
            }
        }
    }
    if (!weight.block && weight.scales)
        for (int64_t c = 0; c < columns; ++c) scales[c] = weight.scales[(begin + c) * weight.scale_stride];
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t c = 0; c < columns; ++c)
            y[t * y_stride + c] = weight.block ? sums[t * kPanelColumns + c] : sums[t * kPanelColumns + c] * scales[c];
}

}  // namespace nvtripy_portable::ISA

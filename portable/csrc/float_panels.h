// Products of many tokens with a panel of weights: 64 rows, of which 128 numbers at a time are widened to float32 and
// turned on their side, so that one vector holds the same number of neighbouring rows. What is left is the same for every
// stored type: a tile of sums stays in registers, and each step adds one input of every token, times the vectors.
//
// The 128 x 64 weights stay in the first-level cache while all tokens meet them, and the sums of the 128 are added up in
// scratch memory: short sums of sums, which are also more exact than long ones.
#pragma once

#include "dequantize.h"
#include "kernels.h"
#include "simd.h"

namespace nvtripy_portable::ISA {

// A tile's sums, with the weights of a step and one input, are as many vectors as there are registers, or just less.
constexpr int kTileTokens = 6;
constexpr int kTileVectors = W == 16 ? 4 : 2;
constexpr int kTileColumns = kTileVectors * W;
static_assert(kPanelColumns % kTileColumns == 0);

// y[t] = the sum of x[t, k] * panel[k], for `depth` rows of kTileColumns numbers; or y += that.
template <int kTokens>
inline void float_tile(const float* x, int64_t x_stride, const float* panel, int64_t depth, float* y, int64_t y_stride,
                       bool add_to) {
    F sums[kTokens][kTileVectors];
    for (int t = 0; t < kTokens; ++t)
        for (int v = 0; v < kTileVectors; ++v) sums[t][v] = zero();
    for (int64_t k = 0; k < depth; ++k) {
        F row[kTileVectors];
        for (int v = 0; v < kTileVectors; ++v) row[v] = load(panel + k * kTileColumns + v * W);
        for (int t = 0; t < kTokens; ++t) {
            const F input = set1(x[t * x_stride + k]);
            for (int v = 0; v < kTileVectors; ++v) sums[t][v] = fma(input, row[v], sums[t][v]);
        }
    }
    for (int t = 0; t < kTokens; ++t)
        for (int v = 0; v < kTileVectors; ++v) {
            float* to = y + t * y_stride + v * W;
            store(to, add_to ? add(load(to), sums[t][v]) : sums[t][v]);
        }
}

inline void float_tiles(int64_t tokens, const float* x, int64_t x_stride, const float* panel, int64_t depth, float* y,
                        int64_t y_stride, bool add_to) {
    switch (tokens) {
        case 1: float_tile<1>(x, x_stride, panel, depth, y, y_stride, add_to); break;
        case 2: float_tile<2>(x, x_stride, panel, depth, y, y_stride, add_to); break;
        case 3: float_tile<3>(x, x_stride, panel, depth, y, y_stride, add_to); break;
        case 4: float_tile<4>(x, x_stride, panel, depth, y, y_stride, add_to); break;
        case 5: float_tile<5>(x, x_stride, panel, depth, y, y_stride, add_to); break;
        default: float_tile<6>(x, x_stride, panel, depth, y, y_stride, add_to); break;
    }
}

// Where row `row` of a panel begins; a step further down the row is kTileColumns numbers further.
inline int64_t panel_offset(int64_t row) { return row / kTileColumns * kTileColumns * kPanelDepth + row % kTileColumns; }

// The end of the last tile of a panel that has the rows begin to end.
inline int64_t tiles_end(int64_t begin, int64_t end) {
    return begin + (end - begin + kTileColumns - 1) / kTileColumns * kTileColumns;
}

// W rows of 16-bit numbers, row_numbers apart: turned on their side two at a time, before they are widened.
template <void (*split)(S, F (&)[2])>
inline void fill_from_pairs(const uint16_t* rows, int64_t row_numbers, int64_t depth, float* to) {
    for (int64_t k = 0; k < depth; k += 2 * W) {
        F square[W];
        for (int r = 0; r < W; ++r)
            square[r] = as_floats(load_s(reinterpret_cast<const int16_t*>(rows + r * row_numbers + k)));
        transpose(square);
        for (int i = 0; i < W; ++i) {
            F both[2];
            split(as_numbers(square[i]), both);
            store(to + (k + 2 * i) * kTileColumns, both[0]);
            store(to + (k + 2 * i + 1) * kTileColumns, both[1]);
        }
    }
}

// Numbers first <= k < first + depth of the rows begin to end, and zeros for what is missing of the last tile.
inline void fill_panel(const Matrix& weight, int64_t begin, int64_t end, int64_t first, int64_t depth, float* panel) {
    alignas(64) float rows[W * kPanelDepth];
    const int64_t padded = (depth + W - 1) / W * W;
    const bool in_pairs = !weight.scales && depth % (2 * W) == 0;
    for (int64_t n = begin; n < tiles_end(begin, end); n += W) {
        const uint16_t* halves = static_cast<const uint16_t*>(weight.data) + n * weight.width + first;
        if (in_pairs && n + W <= end && weight.dtype == Dtype::f16) {
            fill_from_pairs<split_f16>(halves, weight.width, depth, panel + panel_offset(n - begin));
            continue;
        }
        if (in_pairs && n + W <= end && weight.dtype == Dtype::bf16) {
            fill_from_pairs<split_bf16>(halves, weight.width, depth, panel + panel_offset(n - begin));
            continue;
        }
        for (int64_t r = 0; r < W; ++r) {
            float* row = rows + r * kPanelDepth;
            int64_t filled = 0;
            if (n + r < end) {
                dequantize(weight, n + r, first, depth, row);
                filled = depth;
            }
            for (int64_t k = filled; k < padded; ++k) row[k] = 0;
        }
        float* to = panel + panel_offset(n - begin);
        for (int64_t k = 0; k < padded; k += W) {
            F square[W];
            for (int r = 0; r < W; ++r) square[r] = load(rows + r * kPanelDepth + k);
            transpose(square);
            for (int i = 0; i < W; ++i) store(to + (k + i) * kTileColumns, square[i]);
        }
    }
}

// Asks for the numbers from `first` on, a panel's depth, of the weight's rows begin <= n < end. A panel's rows are far
// apart, so nobody else foresees what comes after it; spread over the tokens' tiles this costs nothing.
// Inlined always: GCC takes a function that only prefetches for one that does nothing.
__attribute__((always_inline)) inline void prefetch_part(const Matrix& weight, int64_t begin, int64_t end, int64_t first) {
    if (first >= weight.width) {  // the next panel comes next, here or on another core
        first = 0;
        begin = smaller(begin + kPanelColumns, weight.rows);
        end = smaller(end + kPanelColumns, weight.rows);
    }
    const int64_t row_bytes = weight.row_bytes(), bytes = row_bytes * kPanelDepth / weight.width;
    const char* part = static_cast<const char*>(weight.data) + row_bytes * first / weight.width;
    for (int64_t n = begin; n < end; ++n) {
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(part + n * row_bytes + i, 0, 3);
        __builtin_prefetch(part + n * row_bytes + bytes - 1, 0, 3);  // rows may begin within a cache line
    }
}

inline void float_panels(const Matrix& weight, const float* x, int64_t x_stride, int64_t tokens, int64_t begin,
                         int64_t end, float* y, int64_t y_stride, float* scratch) {
    float* panel = scratch;
    float* sums = scratch + kPanelColumns * kPanelDepth;
    const int64_t columns = end - begin;
    for (int64_t k = 0; k < weight.width; k += kPanelDepth) {
        const int64_t depth = smaller(kPanelDepth, weight.width - k);
        fill_panel(weight, begin, end, k, depth, panel);
        for (int64_t t = 0; t < tokens; t += kTileTokens) {
            const int64_t count = smaller<int64_t>(kTileTokens, tokens - t);
            prefetch_part(weight, begin + t * columns / tokens, begin + (t + count) * columns / tokens, k + kPanelDepth);
            for (int64_t c = 0; c < columns; c += kTileColumns)
                float_tiles(count, x + t * x_stride + k, x_stride,
                            panel + panel_offset(c), depth, sums + t * kPanelColumns + c, kPanelColumns, k > 0);
        }
    }
    for (int64_t t = 0; t < tokens; ++t)
        std::memcpy(y + t * y_stride, sums + t * kPanelColumns, static_cast<size_t>(columns) * sizeof *y);
}

}  // namespace nvtripy_portable::ISA

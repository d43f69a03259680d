// Panels of int8 and int4 weights, made int16: a lane holds two numbers of one row, which one instruction multiplies with two
// inputs and adds up.
#pragma once

#include "float_panels.h"
#include "input_stage.h"
#include "kernels.h"
#include "simd.h"

namespace nvtripy_portable::ISA {

constexpr int kGroup = 32;  // weights that always share a scale
constexpr int kIntegerTokens = kTileTokens, kIntegerColumns = kTileColumns;
constexpr int64_t kIntegerStep = kTileColumns;  // in a panel, from a number of a row to the next

// An int4 row's words come apart into elements 4 j, 4 j + 1, 4 j + 2 and 4 j + 3. Two neighbouring words make a lane, so
// the four lanes of a group give pairs (8 l, 8 l + 4), then (8 l + 1, 8 l + 5), and so on: inputs take this order.
inline void order_as_int4(int16_t* values, int64_t count) {
    for (int64_t start = 0; start < count; start += kGroup) {
        int16_t from[kGroup];
        std::memcpy(from, values + start, sizeof from);
        for (int q = 0; q < 4; ++q)
            for (int i = 0; i < kGroup / 4; ++i) values[start + q * (kGroup / 4) + i] = from[4 * i + q];
    }
}

inline void prepare_panel_integers(const InputStage& stage, Dtype weight, const float* x, float* scratch,
                                   IntegerRow row) {
    prepare_integers(stage, Dtype::i8, x, scratch, row);
    if (weight == Dtype::i4) order_as_int4(row.values, padded_width(stage.width));
}

// y[t] = or += the sum of x[t, k] * panel[k] for 2 * `pairs` numbers, times the token's and the columns' scales.
template <int kTokens>
inline void integer_tile(const int16_t* x, const float* x_scales, int64_t x_stride, const int16_t* panel, int64_t pairs,
                         const float* scales, float* y, bool add_to) {
    I sums[kTokens][kTileVectors];
    for (int t = 0; t < kTokens; ++t)
        for (int v = 0; v < kTileVectors; ++v) sums[t][v] = zero_i();
    for (int64_t p = 0; p < pairs; ++p) {
        S row[kTileVectors];
        for (int v = 0; v < kTileVectors; ++v) row[v] = load_s(panel + (p * kTileColumns + v * W) * 2);
        for (int t = 0; t < kTokens; ++t) {
            const S inputs = set1_pair(x + t * x_stride * 2 + p * 2);
            for (int v = 0; v < kTileVectors; ++v) add_dot(sums[t][v], row[v], inputs);
        }
    }
    // Unrolled, or GCC keeps the sums in memory.
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
        const F by = set1(x_scales[t * x_stride]);
        for (int v = 0; v < kTileVectors; ++v) {
            float* to = y + t * kPanelColumns + v * W;
            const F scaled = mul(to_float(sums[t][v]), mul(by, load(scales + v * W)));
            store(to, add_to ? add(load(to), scaled) : scaled);
        }
    }
}

inline void integer_tiles(int64_t tokens, const int16_t* x, const float* x_scales, int64_t x_stride,
                          const int16_t* panel, int64_t pairs, const float* scales, float* y, bool add_to) {
    switch (tokens) {
        case 1: integer_tile<1>(x, x_scales, x_stride, panel, pairs, scales, y, add_to); break;
        case 2: integer_tile<2>(x, x_scales, x_stride, panel, pairs, scales, y, add_to); break;
        case 3: integer_tile<3>(x, x_scales, x_stride, panel, pairs, scales, y, add_to); break;
        case 4: integer_tile<4>(x, x_scales, x_stride, panel, pairs, scales, y, add_to); break;
        case 5: integer_tile<5>(x, x_scales, x_stride, panel, pairs, scales, y, add_to); break;
        default: integer_tile<6>(x, x_scales, x_stride, panel, pairs, scales, y, add_to); break;
    }
}

// Turns W vectors, one of each row, on their side: the pairs i of all rows go to the places place(i).
template <class Place>
inline void turn(F (&square)[W], int16_t* to, const Place& place) {
    transpose(square);
    for (int i = 0; i < W; ++i) store(reinterpret_cast<float*>(to + place(i) * kTileColumns * 2), square[i]);
}

// As panel_offset.
inline int64_t integer_panel_offset(int64_t row) {
    return row / kTileColumns * kTileColumns * kPanelDepth + row % kTileColumns * 2;
}

// The block of 128 weights `block` of the rows begin to end, zeros for what is missing of it and of the last tile.
inline void fill_integer_panel(const Matrix& weight, int64_t begin, int64_t end, int64_t block, int16_t* panel) {
    const bool int4 = weight.dtype == Dtype::i4;
    const int64_t row_bytes = weight.row_bytes(), block_bytes = int4 ? kPanelDepth / 2 : kPanelDepth;
    const int64_t here = smaller(block_bytes, row_bytes - block * block_bytes);
    for (int64_t n = begin; n < tiles_end(begin, end); n += W) {
        const uint8_t* rows[W];
        uint8_t parts[W][kPanelDepth];
        for (int64_t r = 0; r < W; ++r) {
            const bool is_there = n + r < end;
            const auto* data = static_cast<const uint8_t*>(weight.data);
            rows[r] = is_there ? data + (n + r) * row_bytes + block * block_bytes : parts[r];
            if (is_there && here == block_bytes) continue;
            std::memset(parts[r], 0, sizeof parts[r]);
            if (is_there) std::memcpy(parts[r], rows[r], static_cast<size_t>(here));
            rows[r] = parts[r];
        }
        int16_t* to = panel + integer_panel_offset(n - begin);
        F square[W];
        if (!int4) {
            for (int64_t k = 0; k < kPanelDepth; k += 2 * W) {
                for (int r = 0; r < W; ++r)
                    square[r] = as_floats(widen_i8(reinterpret_cast<const int8_t*>(rows[r]) + k));
                turn(square, to, [k](int i) { return k / 2 + i; });
            }
            continue;
        }
        for (int64_t k = 0; k < kPanelDepth; k += 8 * W)
            for (int q = 0; q < 4; ++q) {
                for (int r = 0; r < W; ++r) {
                    const Nibbles words(rows[r] + k / 2);
                    square[r] = as_floats(q == 0 ? words.part0() : q == 1 ? words.part1() : q == 2 ? words.part2() : words.part3());
                }
                turn(square, to, [k, q](int i) { return k / 2 + i / 4 * 16 + q * 4 + i % 4; });
            }
    }
}

}  // namespace nvtripy_portable::ISA

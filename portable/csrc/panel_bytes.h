// Panels of int8 and int4 weights on NEON with products of bytes: they lie as byte_dots.h multiplies them, and inputs as they
// do for generated tokens.
#pragma once

#include "byte_dots.h"
#include "input_stage.h"
#include "kernels.h"
#include "simd.h"

namespace nvtripy_portable::ISA {

// Of a tile: 24 sums either way, of 32 registers.
constexpr int kIntegerTokens = ISA_BYTES == 2 ? 6 : 3;
constexpr int kIntegerFours = ISA_BYTES == 2 ? 2 : 1;
constexpr int kIntegerColumns = 4 * kIntegerFours;
constexpr int64_t kIntegerStep = 2;  // in a panel, from a number of four rows to the next

inline void prepare_panel_integers(const InputStage& stage, Dtype weight, const float* x, float* scratch,
                                   IntegerRow row) {
    prepare_integers(stage, weight, x, scratch, row);
}

// Where a tile's columns begin: 4 bytes a step, as int16.
inline int64_t integer_panel_offset(int64_t column) { return column / 4 * kPanelDepth * kIntegerStep; }

// y[t] = or += the sum of x[t, k] * panel[k] for 2 * `pairs` numbers, times the token's and the columns' scales.
template <int kTokens>
inline void integer_tile(const int16_t* x, const float* x_scales, int64_t x_stride, const int16_t* panel, int64_t pairs,
                         const float* scales, float* y, bool add_to) {
    FourSums sums[kTokens][kIntegerFours];
    for (int t = 0; t < kTokens; ++t)
        for (int f = 0; f < kIntegerFours; ++f) sums[t][f] = no_sums();
    for (int64_t k = 0; k < 2 * pairs; k += 16) {
        FourRows fours[kIntegerFours];
        for (int f = 0; f < kIntegerFours; ++f)
            for (int i = 0; i < 4; ++i)
                fours[f].parts[i] = vreinterpretq_s8_s16(vld1q_s16(panel + integer_panel_offset(4 * f) + k * kIntegerStep + 8 * i));
        for (int t = 0; t < kTokens; ++t)
            for (int f = 0; f < kIntegerFours; ++f) add_16(sums[t][f], fours[f], x + t * x_stride * 2 + k);
    }
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
        for (int f = 0; f < kIntegerFours; ++f) {
            float* to = y + t * kPanelColumns + 4 * f;
            const float32x4_t scaled = vmulq_f32(total(sums[t][f]), vmulq_n_f32(vld1q_f32(scales + 4 * f), x_scales[t * x_stride]));
            vst1q_f32(to, add_to ? vaddq_f32(vld1q_f32(to), scaled) : scaled);
        }
}

inline void integer_tiles(int64_t tokens, const int16_t* x, const float* x_scales, int64_t x_stride,
                          const int16_t* panel, int64_t pairs, const float* scales, float* y, bool add_to) {
    switch (tokens) {
        case 1: integer_tile<1>(x, x_scales, x_stride, panel, pairs, scales, y, add_to); break;
        case 2: integer_tile<2>(x, x_scales, x_stride, panel, pairs, scales, y, add_to); break;
#if ISA_BYTES == 2
        case 3: integer_tile<3>(x, x_scales, x_stride, panel, pairs, scales, y, add_to); break;
        case 4: integer_tile<4>(x, x_scales, x_stride, panel, pairs, scales, y, add_to); break;
        case 5: integer_tile<5>(x, x_scales, x_stride, panel, pairs, scales, y, add_to); break;
#endif
        default: integer_tile<kIntegerTokens>(x, x_scales, x_stride, panel, pairs, scales, y, add_to); break;
    }
}

// Four rows of 128 weights.
template <bool kInt4>
inline void fill_four(const uint8_t* const* rows, int16_t* to) {
    for (int k = 0; k < kPanelDepth; k += 32) {
        int8x16_t numbers[4][2];
        for (int r = 0; r < 4; ++r) load_32<kInt4>(rows[r] + (kInt4 ? k / 2 : k), numbers[r]);
        for (int half = 0; half < 2; ++half) {
            const FourRows four = four_rows(numbers[0][half], numbers[1][half], numbers[2][half], numbers[3][half]);
            for (int i = 0; i < 4; ++i) vst1q_s16(to + (k + half * 16) * kIntegerStep + 8 * i, vreinterpretq_s16_s8(four.parts[i]));
        }
    }
}

// The block of 128 weights `block` of the rows begin to end, zeros for what is missing of it and of the last tile.
inline void fill_integer_panel(const Matrix& weight, int64_t begin, int64_t end, int64_t block, int16_t* panel) {
    const bool int4 = weight.dtype == Dtype::i4;
    const int64_t row_bytes = weight.row_bytes(), block_bytes = int4 ? kPanelDepth / 2 : kPanelDepth;
    const int64_t here = smaller(block_bytes, row_bytes - block * block_bytes);
    const int64_t columns = (end - begin + kIntegerColumns - 1) / kIntegerColumns * kIntegerColumns;
    for (int64_t c = 0; c < columns; c += 4) {
        const uint8_t* rows[4];
        uint8_t parts[4][kPanelDepth];
        for (int64_t r = 0; r < 4; ++r) {
            const bool is_there = begin + c + r < end;
            rows[r] = static_cast<const uint8_t*>(weight.data) + (begin + c + r) * row_bytes + block * block_bytes;
            if (is_there && here == block_bytes) continue;
            std::memset(parts[r], 0, sizeof parts[r]);
            if (is_there) std::memcpy(parts[r], rows[r], static_cast<size_t>(here));
            rows[r] = parts[r];
        }
        int16_t* to = panel + integer_panel_offset(c);
        if (int4) fill_four<true>(rows, to);
        else fill_four<false>(rows, to);
    }
}

}  // namespace nvtripy_portable::ISA

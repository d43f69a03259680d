// Products of int8 and int4 weights with generated tokens on NEON with products of bytes: four rows at a time, as they are
// stored, so that rows share the loads of inputs.
#pragma once

#include "byte_dots.h"
#include "kernels.h"
#include "scales.h"
#include "simd.h"

namespace nvtripy_portable::ISA {

constexpr int kByteTokens = ISA_BYTES == 2 ? 4 : 2;  // of a tile: 8 or 16 sums

// The scales of four rows' groups of 32, group by group, of the 128 weights from group `first` on.
inline void load_group_scales(const float* const* own, int64_t first, int64_t block, int64_t count, float32x4_t (&to)[4]) {
    for (int r = 0; r < 4; ++r) {
        if (block == 32 && first + 4 <= count) {
            to[r] = vld1q_f32(own[r] + first);
            continue;
        }
        float scales[4];
        for (int64_t g = 0; g < 4; ++g) scales[g] = own[r][group_scale(first + g, block, count)];
        to[r] = vld1q_f32(scales);
    }
    transpose(to[0], to[1], to[2], to[3]);
}

// Where there are fewer than four rows the last one stands in for the others.
template <bool kInt4, int kTokens, Scales kScales>
inline void byte_tile(const Matrix& weight, const IntegerRow* x, int64_t n, int64_t rows, float* y, int64_t y_stride) {
    constexpr int64_t kBytes = kInt4 ? 64 : 128;  // of 128 weights
    const int64_t row_bytes = weight.row_bytes(), blocks = (weight.width + 127) / 128, whole = weight.width / 128;
    const uint8_t* w[4];
    const float* scales[4];
    for (int64_t r = 0; r < 4; ++r) {
        const int64_t row = n + smaller(r, rows - 1);
        w[r] = static_cast<const uint8_t*>(weight.data) + row * row_bytes;
        scales[r] = weight.scales ? weight.scales + row * weight.scale_stride : nullptr;
    }
    const uint8_t* ahead = w[0] + bytes_ahead();
    float32x4_t sums[kTokens];
    for (int t = 0; t < kTokens; ++t) sums[t] = vdupq_n_f32(0);
    uint8_t last[4][kBytes];
    for (int64_t b = 0; b < blocks; ++b) {
        // Asked for in the order of the memory, not in that of the blocks.
        for (int i = 0; i < 4 * kBytes; i += 64, ahead += 64) prefetch_once(ahead);
        if (b == whole)  // the rest of the rows, with zeros
            for (int r = 0; r < 4; ++r) {
                std::memset(last[r], 0, kBytes);
                std::memcpy(last[r], w[r], static_cast<size_t>(row_bytes - whole * kBytes));
                w[r] = last[r];
            }
        float32x4_t by[4];
        if constexpr (kScales == Scales::block)
            by[0] = float32x4_t{scales[0][b], scales[1][b], scales[2][b], scales[3][b]};
        if constexpr (kScales == Scales::group) load_group_scales(scales, b * 4, weight.block, weight.scale_stride, by);
        FourSums run[kTokens];
        for (int t = 0; t < kTokens; ++t) run[t] = no_sums();
        const auto add_run = [&](int group) __attribute__((always_inline)) {
            for (int t = 0; t < kTokens; ++t) {
                const float scale = x[t].scales[b];
                if constexpr (kScales == Scales::row) sums[t] = vfmaq_n_f32(sums[t], total(run[t]), scale);
                else sums[t] = vfmaq_f32(sums[t], total(run[t]), vmulq_n_f32(by[group], scale));
                run[t] = no_sums();
            }
        };
        // One behind the other: unrolled, GCC loads everything first and keeps sums in memory.
#pragma GCC unroll 1
        for (int group = 0; group < 4; ++group) {
            int8x16_t numbers[4][2];
            for (int r = 0; r < 4; ++r) load_32<kInt4>(w[r] + group * kBytes / 4, numbers[r]);
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                const FourRows four = four_rows(numbers[0][half], numbers[1][half], numbers[2][half], numbers[3][half]);
                for (int t = 0; t < kTokens; ++t) add_16(run[t], four, x[t].values + b * 128 + group * 32 + half * 16);
            }
            if (kScales == Scales::group) add_run(group);
        }
        if (kScales != Scales::group) add_run(0);
        for (int r = 0; r < 4; ++r) w[r] += kBytes;
    }
    for (int t = 0; t < kTokens; ++t) {
        float values[4];
        vst1q_f32(values, sums[t]);
        for (int64_t r = 0; r < rows; ++r)
            y[t * y_stride + r] = values[r] * (kScales == Scales::row && weight.scales ? scales[r][0] : 1.0f);
    }
}

template <bool kInt4, int kTokens, Scales kScales>
inline void byte_tiles(const Matrix& weight, const IntegerRow* x, int64_t n, int64_t rows, float* y, int64_t y_stride) {
    byte_tile<kInt4, smaller(kTokens, kByteTokens), kScales>(weight, x, n, rows, y, y_stride);
    if constexpr (kTokens > kByteTokens)
        byte_tiles<kInt4, kTokens - kByteTokens, kScales>(weight, x + kByteTokens, n, rows, y + kByteTokens * y_stride, y_stride);
}

template <bool kInt4, int kTokens, Scales kScales>
inline void integer_rows(const Matrix& weight, const IntegerRow* x, int64_t begin, int64_t end, float* y,
                         int64_t y_stride) {
    for (int64_t n = begin; n < end; n += 4)
        byte_tiles<kInt4, kTokens, kScales>(weight, x, n, smaller<int64_t>(4, end - n), y + (n - begin), y_stride);
}

}  // namespace nvtripy_portable::ISA

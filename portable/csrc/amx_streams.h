// Products of floats with up to 32 generated tokens: weights meet them as they come from memory, a step of 32 numbers of 32 rows
// at a time, and sums stay in their tiles from a row's beginning to its end. While the tiles of a step are multiplied, the
// numbers of the next one are converted: one after the other would take as long as both.
//
// On an Emerald Rapids (float16, 124M) 16 tokens have 1.9 times the speed that vectors give, 32 have 2.1, four have 0.8 and one
// has 0.7: converting takes two thirds of the time in which memory answers, and only a part of it is hidden. Four tiles of
// rows instead of two, two steps ahead instead of one, and a step's products between thirds of the next one's numbers were no
// faster; weights asked for with T0 instead of T1 half as fast. One token without tiles, to a tile's bits, was no faster than
// this: a tile's order of summing wants 16 rows side by side, and turning them costs more than the products.
#pragma once

#include "amx_inputs.h"
#include "amx_products.h"
#include "amx_tiles.h"
#include "amx_weights.h"
#include "kernels.h"
#include "simd.h"

namespace nvtripy_portable::ISA {

constexpr int64_t kStreamedRows = 2 * kTileSide;
constexpr int64_t kStreamedGroups = 2;

// The tiles of sums of up to kStreamedRows rows from row `begin` on. Where there are fewer, the last one stands in for the rest.
template <class Numbers, int kRows, int kGroups, int kSides, int kParts>
inline void stream_tiles(const Matrix& weight, const TileWork& work, int64_t begin, int64_t rows) {
    using Stored = typename Numbers::Stored;
    constexpr int64_t kStepBytes = 32 * static_cast<int64_t>(sizeof(Stored)), kAllRows = kRows * kTileSide;
    const int64_t row_bytes = weight.row_bytes(), width = weight.width;
    const auto* data = static_cast<const uint8_t*>(weight.data) + begin * row_bytes;
    const Stored* lines[kAllRows];
    for (int64_t r = 0; r < kAllRows; ++r) lines[r] = reinterpret_cast<const Stored*>(data + smaller(r, rows - 1) * row_bytes);
    // Asked for in the order of the memory, not in that of the steps.
    const uint8_t* ahead = data + larger(rows * row_bytes, bytes_ahead());
    const auto tile = [&](int64_t step, int64_t row_tile, int side) {
        return work.panel.begin + ((step % 2 * 2 + row_tile) * 2 + side) * kTileBytes;
    };
    const auto fill_last = [&](const Stored* const* from, int64_t k, int64_t left, char* to) {
        for (int64_t r = 0; r < kTileSide; ++r) {
            Stored part[32] = {};
            if (left > 0) std::memcpy(part, from[r] + k, static_cast<size_t>(left) * sizeof *part);
            fill_line<Numbers, kSides>(part, to + r * kTileRowBytes, to + r * kTileRowBytes + kTileBytes);
        }
    };
    const auto fill = [&](int64_t step) __attribute__((always_inline)) {
        const int64_t left = width - step * 32;
        for (int64_t row_tile = 0; row_tile < kRows; ++row_tile) {
            char* to = tile(step, row_tile, 0);
            const Stored* const* from = lines + row_tile * kTileSide;
            if (left < 32) {
                fill_last(from, step * 32, larger<int64_t>(left, 0), to);
                continue;
            }
#pragma GCC unroll 4
            for (int64_t r = 0; r < kTileSide; ++r) {
                if (r * kStepBytes % 64 == 0) prefetch_later(ahead + r * kStepBytes);
                fill_line<Numbers, kSides>(from[r] + step * 32, to + r * kTileRowBytes, to + r * kTileRowBytes + kTileBytes);
            }
            ahead += kTileSide * kStepBytes;
        }
    };
    const char* const columns[2] = {work.tiles[0], work.tiles[kGroups - 1]};
    each_sum<kRows, kGroups>([&]<int kTile>(int64_t, int64_t) __attribute__((always_inline)) { zero_tile<kTile>(); });
    const int64_t steps = padded_width(width) / 32;
    fill(0);
    for (int64_t step = 0; step < steps; ++step) {
        add_step<kRows, kGroups, kSides, kParts>([&](int row, int side) { return tile(step, row, side); }, columns,
                                                 step * kTileBytes, work.part_bytes);
        if (step + 1 < steps) fill(step + 1);
    }
    each_sum<kRows, kGroups>([&]<int kTile>(int64_t r, int64_t c) __attribute__((always_inline)) {
        store_tile<kTile>(work.sums_at(r, c), kTileRowBytes);
    });
}

template <class Numbers, int kSides, int kParts>
inline void stream_parts(const Matrix& weight, const TileWork& work, int64_t begin, int64_t rows) {
    if (rows > kTileSide) {
        if (work.groups == 2) stream_tiles<Numbers, 2, 2, kSides, kParts>(weight, work, begin, rows);
        else stream_tiles<Numbers, 2, 1, kSides, kParts>(weight, work, begin, rows);
    } else {
        if (work.groups == 2) stream_tiles<Numbers, 1, 2, kSides, kParts>(weight, work, begin, rows);
        else stream_tiles<Numbers, 1, 1, kSides, kParts>(weight, work, begin, rows);
    }
}

template <class Numbers>
inline void stream_numbers(const Matrix& weight, const TileWork& work, int64_t begin, int64_t rows) {
    if (work.parts == 3) stream_parts<Numbers, 1, 3>(weight, work, begin, rows);
    else if (work.parts == 2) stream_parts<Numbers, 1, 2>(weight, work, begin, rows);
    else stream_parts<Numbers, 1, 1>(weight, work, begin, rows);
}

inline void stream_floats(const Matrix& weight, const TileWork& work, int64_t begin, int64_t rows) {
    switch (weight.dtype) {
        case Dtype::f16:
            if (work.parts == 2) stream_parts<F16, 2, 2>(weight, work, begin, rows);
            else stream_parts<F16, 2, 1>(weight, work, begin, rows);
            break;
        case Dtype::bf16: stream_numbers<BF16>(weight, work, begin, rows); break;
        case Dtype::i8: stream_numbers<I8>(weight, work, begin, rows); break;
        default:
            if (weight.has_nan) stream_numbers<F8WithNaN>(weight, work, begin, rows);
            else stream_numbers<F8>(weight, work, begin, rows);
            break;
    }
}

}  // namespace nvtripy_portable::ISA

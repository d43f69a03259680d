// Rows of weights as the rows of tiles: kTileDepth numbers of up to kTileWeights rows, converted once and met by all tokens.
// Weights that could be used where they lie are copied as well: rows of a width like 4096 would all fall on the same lines of
// the first-level cache, and a copy takes a tenth of the time in which memory delivers them.
#pragma once

#include "amx_inputs.h"
#include "amx_tiles.h"
#include "dequantize.h"
#include "kernels.h"
#include "simd.h"

namespace nvtripy_portable::ISA {

// Float16 has 11 significant bits: the first 8 are one bfloat16, what they leave is another. Everything else is one.
inline int sides_of(const Matrix& weight) { return weight.dtype == Dtype::f16 ? 2 : 1; }

// Some numbers of some rows, and where a tile of them lies: of 16 rows, of one step, high or low.
struct PanelTiles {
    char* begin;
    int64_t steps;         // that there is room for
    int sides;
    int64_t first, depth;  // the first number of each row, and how many there are
    char* at(int64_t rows, int64_t step, int side) const {
        return begin + ((rows * steps + step) * sides + side) * kTileBytes;
    }
};

// What a float32 leaves of itself when its upper half is taken away. Infinity leaves NaN.
inline F without_upper_half(F x) { return sub(x, reinterpret_cast<F>(reinterpret_cast<Words>(x) & 0xffff0000u)); }

// 32 numbers as a line of a tile, or of two. What is stored as 8 bits or less needs no second.
template <class Numbers, int kSides>
inline void fill_line(const typename Numbers::Stored* from, char* high, char* low) {
    for (int i = 0; i < kTileSide; i += W) {
        const F numbers[2] = {Numbers::load(from + i), Numbers::load(from + kTileSide + i)};
        store_upper_halves(high + i * 4, numbers[0], numbers[1]);
        if constexpr (kSides == 2)
            store_upper_halves(low + i * 4, without_upper_half(numbers[0]), without_upper_half(numbers[1]));
    }
}
template <>
inline void fill_line<BF16, 1>(const uint16_t* from, char* high, char*) {
    uint16_t numbers[32];
    for (int i = 0; i < kTileSide; ++i) {
        numbers[2 * i] = from[i];
        numbers[2 * i + 1] = from[kTileSide + i];
    }
    std::memcpy(high, numbers, sizeof numbers);
}

// A panel's numbers of a row, beyond its end zeros; `row` counts the panel's.
template <class Numbers, int kSides>
inline void fill_float_row(int64_t width, const uint8_t* data, int64_t row, const PanelTiles& to) {
    using Stored = typename Numbers::Stored;
    const auto* from = reinterpret_cast<const Stored*>(data) + to.first;
    const int64_t left = width - to.first;
    Stored part[kTileDepth];
    if (left < to.depth) {
        std::memcpy(part, from, static_cast<size_t>(left) * sizeof *part);
        std::memset(part + left, 0, static_cast<size_t>(to.depth - left) * sizeof *part);
        from = part;
    }
    char* line = to.at(row / kTileSide, 0, 0) + row % kTileSide * kTileRowBytes;
#pragma GCC unroll 4
    for (int64_t k = 0; k < to.depth; k += 32, line += kSides * kTileBytes)
        fill_line<Numbers, kSides>(from + k, line, line + kTileBytes);
}

// A block of packed int4 as integers, two lines, for each run the even ones before the odd ones.
template <int kRun>
inline void unpack_runs(const uint8_t* packed, int8_t* const (&lines)[2]) {
    for (int start = 0; start < kInputBlock; start += kRun) {
        const int odd = start + kRun / 2;
        int8_t *first = lines[start / 64] + start % 64, *second = lines[odd / 64] + odd % 64;
        for (int i = 0; i < kRun / 2; ++i) {
            const uint8_t both = packed[start / 2 + i];
            first[i] = static_cast<int8_t>(((both & 15) ^ 8) - 8);
            second[i] = static_cast<int8_t>(((both >> 4) ^ 8) - 8);
        }
    }
}

// As fill_float_row.
inline void fill_integer_row(const Matrix& weight, const uint8_t* data, int64_t row, const PanelTiles& to) {
    const bool int4 = weight.dtype == Dtype::i4;
    const int64_t block_bytes = int4 ? kInputBlock / 2 : kInputBlock;
    int64_t left = weight.row_bytes() - (int4 ? to.first / 2 : to.first);
    const uint8_t* from = data + weight.row_bytes() - left;
    for (int64_t block = 0; block < to.depth / kInputBlock; ++block) {
        uint8_t part[kInputBlock];
        if (left < block_bytes) {
            std::memset(part, 0, sizeof part);
            std::memcpy(part, from, static_cast<size_t>(left));
            from = part;
        }
        const int64_t line = row % kTileSide * kTileRowBytes;
        int8_t* const lines[2] = {reinterpret_cast<int8_t*>(to.at(row / kTileSide, 2 * block, 0) + line),
                                  reinterpret_cast<int8_t*>(to.at(row / kTileSide, 2 * block + 1, 0) + line)};
        if (!int4)
            for (int step = 0; step < 2; ++step) std::memcpy(lines[step], from + step * kTileRowBytes, kTileRowBytes);
        else switch (run_of(weight)) {
            case 32: unpack_runs<32>(from, lines); break;
            case 64: unpack_runs<64>(from, lines); break;
            default: unpack_runs<128>(from, lines); break;
        }
        from += block_bytes;
        left -= block_bytes;
    }
}

inline void fill_row(const Linear& linear, int64_t n, int64_t row, const PanelTiles& to) {
    const Matrix& weight = linear.weight;
    const auto* data = static_cast<const uint8_t*>(weight.data) + n * weight.row_bytes();
    if (linear.integers) {
        fill_integer_row(weight, data, row, to);
        return;
    }
    switch (weight.dtype) {
        case Dtype::f16: fill_float_row<F16, 2>(weight.width, data, row, to); break;
        case Dtype::bf16: fill_float_row<BF16, 1>(weight.width, data, row, to); break;
        case Dtype::i8: fill_float_row<I8, 1>(weight.width, data, row, to); break;
        default:
            if (weight.has_nan) fill_float_row<F8WithNaN, 1>(weight.width, data, row, to);
            else fill_float_row<F8, 1>(weight.width, data, row, to);
            break;
    }
}

// What a row's sum is to be multiplied by, besides scales of blocks.
inline float row_scale_of(const Linear& linear, int64_t n) {
    const Matrix& weight = linear.weight;
    const float scale = weight.scales && !weight.block ? weight.scales[n * weight.scale_stride] : 1.0f;
    return weight.dtype == Dtype::f8 ? scale * F8::kFactor : scale;
}

}  // namespace nvtripy_portable::ISA

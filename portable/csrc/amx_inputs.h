// Inputs of linear operations as the columns of tiles.
//
// A bfloat16 has 8 significant bits, a float32 24: an input is the sum of up to three bfloat16, rounded to the nearest, each
// of what the ones before it leave. A 16-bit integer is 256 * high + low, both int8. Tokens stand in groups of 16, whose
// columns are their parts:
// - of integers a token's two bytes are neighbouring columns, each with a sum of its own, so that eight tokens fill a tile;
// - of floats each part of the 16 tokens is a tile, and they are added to the same sums, so that parts may be left out.
//
// How many parts. Three, and two where inputs are declared to have 16 bits: what is left out is at most 2^-16 of a term. So it
// is where inputs meet float16 weights, which are two bfloat16 themselves, w = high + low: of the six products the largest
// three are taken, high * x0, high * x1, low * x0. What is left out is
// at most 2^-16 of a term for low * x1 and for high * x2, each. Such inputs are declared float16, which rounds to 2^-11, and
// their keys and values are kept in it: the program may keep more, but need not. GPT-2 124M's logits after a prompt of 100
// tokens change by 2e-5 of their spread, where they deviate by 6e-4 from float32's either way.
//
// Inputs that were rounded to int8 or E4M3 are exact in one part, and their scale is applied to the sums.
#pragma once

#include "amx_tiles.h"
#include "input_stage.h"
#include "kernels.h"
#include "numbers.h"
#include "simd.h"

namespace nvtripy_portable::ISA {

constexpr int64_t kTokenGroup = kTileSide;
constexpr float kLargestInTwoBytes = 127 * 256 + 127;  // = 256 * high + low, both at most 127

// How a linear operation's inputs are kept.
struct TileInputs {
    bool integers;
    int parts;
    int64_t width;         // padded
    int64_t step_numbers;  // of a row of A in a tile
    int64_t steps;         // tiles that a row of A is cut into

    int64_t scale_floats() const { return integers ? width / kInputBlock * parts * kTokenGroup : kTokenGroup; }
    int64_t part_bytes() const { return steps * kTileBytes; }
    int64_t group_floats() const { return scale_floats() + parts * part_bytes() / 4; }
    // Where a group's scales begin, in floats: of integers, for each block of inputs, one for each column; of others one for
    // each token. And its tiles: of each 16 columns, those of all steps one behind the other.
    int64_t scales_at(int64_t group) const { return group * group_floats(); }
    int64_t tiles_at(int64_t group) const { return group * group_floats() + scale_floats(); }
    // Tiles of sums of `tokens` tokens of a group.
    int64_t sum_tiles(int64_t tokens) const {
        return integers ? (tokens * parts + kTileSide - 1) / kTileSide : 1;
    }
};

inline TileInputs tile_inputs(const Linear& linear) {
    TileInputs inputs;
    inputs.integers = linear.integers;
    inputs.width = padded_width(linear.stage.width);
    inputs.step_numbers = linear.integers ? 64 : 32;
    inputs.steps = inputs.width / inputs.step_numbers;
    if (linear.integers) inputs.parts = linear.stage.rounding == Rounding::i8 ? 1 : 2;
    else if (linear.stage.rounding != Rounding::none) inputs.parts = 1;
    else inputs.parts = linear.weight.dtype == Dtype::f16 || linear.short_inputs ? 2 : 3;
    return inputs;
}

// The column of a token's part, counted through the group's tiles.
inline int64_t column_of(const TileInputs& inputs, int64_t token, int64_t part) {
    return inputs.integers ? token * inputs.parts + part : part * kTileSide + token;
}

// Weights that share a scale and lie in one block of inputs; a multiple of 32, as integer inputs require.
inline int64_t run_of(const Matrix& weight) {
    int64_t run = kInputBlock;
    while (weight.block % run != 0) run /= 2;
    return run;
}

// The four bytes of `column` that meet bytes 4 k to 4 k + 3 of A's rows, for each k.
inline void store_column(char* tile, int64_t column, const void* numbers) {
    for (int k = 0; k < kTileSide; ++k)
        std::memcpy(tile + k * kTileRowBytes + column * 4, static_cast<const char*>(numbers) + k * 4, 4);
}

// The bfloat16 nearest to x; of finite numbers a finite one.
inline uint16_t finite_bf16(float x) {
    const uint32_t bits = float_bits(x), magnitude = bits & 0x7fffffffu;
    return magnitude >= 0x7f7f8000u && magnitude < 0x7f800000u ? static_cast<uint16_t>(bits >> 16) : to_bf16(x);
}

// 32 numbers as the sums of `count` bfloat16 each. Infinity and NaN are in the first, and nothing in the others.
inline void take_apart(const float* x, int count, uint16_t (&parts)[3][32]) {
    float rest[32];
    std::memcpy(rest, x, sizeof rest);
    for (int part = 0; part < count; ++part)
        for (int i = 0; i < 32; ++i) {
            parts[part][i] = finite_bf16(rest[i]);
            const float difference = rest[i] - to_float_bits(static_cast<uint32_t>(parts[part][i]) << 16);
            rest[i] = difference == difference ? difference : 0.0f;
        }
}

// A block of integers in the order of the weights' numbers in a tile: int4 come with the even ones of a run before the odd ones.
inline void order_as_weights(const Matrix& weight, int16_t (&values)[kInputBlock]) {
    if (weight.dtype != Dtype::i4) return;
    int16_t from[kInputBlock];
    std::memcpy(from, values, sizeof from);
    const int64_t run = run_of(weight), half = run / 2;
    for (int64_t start = 0; start < kInputBlock; start += run)
        for (int64_t i = 0; i < half; ++i) {
            values[start + i] = from[start + 2 * i];
            values[start + half + i] = from[start + 2 * i + 1];
        }
}

// A row of integers; its bytes are the parts.
inline void store_integers(const Linear& linear, const TileInputs& inputs, const float* row, float row_scale, int64_t token,
                           float* scales, char* tiles) {
    for (int64_t start = 0; start < inputs.width; start += kInputBlock) {
        int16_t values[kInputBlock];
        const float scale = row_scale * round_block(row + start, linear.stage.rounding, kLargestInTwoBytes, values);
        order_as_weights(linear.weight, values);
        int8_t bytes[2][kInputBlock];  // high and low; or the only ones
        for (int i = 0; i < kInputBlock; ++i) {
            const int value = values[i], low = static_cast<int8_t>(value & 255);
            bytes[0][i] = static_cast<int8_t>(inputs.parts == 2 ? (value - low) / 256 : value);
            bytes[1][i] = static_cast<int8_t>(low);
        }
        for (int64_t part = 0; part < inputs.parts; ++part) {
            const int64_t column = column_of(inputs, token, part);
            scales[start / kInputBlock * inputs.parts * kTileSide + column] = scale;
            char* tile = tiles + column / kTileSide * inputs.part_bytes() + start / 64 * kTileBytes;
            for (int64_t step = 0; step < kInputBlock / 64; ++step)
                store_column(tile + step * kTileBytes, column % kTileSide, bytes[part] + step * 64);
        }
    }
}

// As Kernels::prepare, where weights are to meet tiles. Columns that belong to no token stay what they are: what a column of
// sums comes to depends on the same column of inputs alone, and nobody looks at theirs.
inline void prepare_tiles(const Linear& linear, const float* x, int64_t begin, int64_t end, float* prepared,
                          float* scratch) {
    const TileInputs inputs = tile_inputs(linear);
    for (int64_t t = begin; t < end; ++t) {
        const int64_t token = t % kTokenGroup;
        float* scales = prepared + inputs.scales_at(t / kTokenGroup);
        char* tiles = reinterpret_cast<char*>(prepared + inputs.tiles_at(t / kTokenGroup));
        normalize(linear.stage, x + t * linear.stage.input_width(), scratch);
        const float row_scale = linear.stage.rounding == Rounding::none ? 1.0f : round_row(linear.stage, scratch);
        if (inputs.integers) {
            store_integers(linear, inputs, scratch, row_scale, token, scales, tiles);
            continue;
        }
        scales[token] = row_scale;
        for (int64_t step = 0; step < inputs.steps; ++step) {
            uint16_t parts[3][32];
            take_apart(scratch + step * 32, inputs.parts, parts);
            for (int64_t part = 0; part < inputs.parts; ++part) {
                const int64_t column = column_of(inputs, token, part);
                store_column(tiles + column / kTileSide * inputs.part_bytes() + step * kTileBytes, column % kTileSide,
                             parts[part]);
            }
        }
    }
}

}  // namespace nvtripy_portable::ISA

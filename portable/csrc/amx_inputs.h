// Inputs of linear operations as the columns of tiles.
//
// A bfloat16 has 8 significant bits, a float32 24: an input is the sum of up to three bfloat16, rounded to the nearest, each
// of what the ones before it leave. A 16-bit integer is 256 * high + low, both int8. Tokens stand in groups of 16, whose
// columns are their parts, each of the 16 tokens' a tile: of floats they are added to the same sums, so that parts may be left
// out; of integers each byte has sums of its own.
//
// How many parts. Three, and two where inputs are declared to have 16 bits: what is left out is at most 2^-16 of a term. So it
// is where inputs meet float16 weights, which are two bfloat16 themselves, w = high + low: of the six products the largest
// three are taken, high * x0, high * x1, low * x0. What is left out is at most 2^-16 of a term for low * x1 and for high * x2,
// each. Such inputs are declared float16, which rounds to 2^-11, and their keys and values are kept in it: the program may
// keep more, but need not. GPT-2 124M's logits after a prompt of 100 tokens change by 2e-5 of their spread, where they deviate
// by 6e-4 from float32's either way.
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

    int64_t scale_floats() const { return (integers ? width / kInputBlock : 1) * kTokenGroup; }
    int64_t part_bytes() const { return steps * kTileBytes; }
    int64_t group_floats() const { return scale_floats() + parts * part_bytes() / 4; }
    // Where a group's scales begin, in floats: one for each token, of integers for each block of inputs. And its tiles: of
    // each part those of all steps, one behind the other.
    int64_t scales_at(int64_t group) const { return group * group_floats(); }
    int64_t tiles_at(int64_t group) const { return group * group_floats() + scale_floats(); }
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

// Weights that share a scale and lie in one block of inputs; a multiple of 32, as integer inputs require.
inline int64_t run_of(const Matrix& weight) {
    int64_t run = kInputBlock;
    while (weight.block % run != 0) run /= 2;
    return run;
}

typedef int32_t Integers __attribute__((vector_size(sizeof(F))));
typedef uint32_t Words __attribute__((vector_size(sizeof(F))));

// The upper halves of 2W float32, bfloat16 where the lower ones are zeros or not wanted, as W pairs of a line of a tile. In all
// lines of floats, of weights and of inputs, number i of a step stands beside number i + 16: that costs the least to make.
inline void store_upper_halves(char* to, F first, F second) {
    const Words low = reinterpret_cast<Words>(first) >> 16;
#if ISA_NUMBER(ISA) == 3
    const Words pairs = reinterpret_cast<Words>(_mm512_mask_blend_epi16(0xaaaaaaaau, reinterpret_cast<I>(low),
                                                                        reinterpret_cast<I>(second)));
#else
    const Words pairs = low | (reinterpret_cast<Words>(second) & 0xffff0000u);
#endif
    std::memcpy(to, &pairs, sizeof pairs);
}

// The bfloat16 nearest to x, a half to the even; of finite numbers a finite one.
inline F finite_bf16(F x) {
    const Words bits = reinterpret_cast<Words>(x), magnitude = bits & 0x7fffffffu;
    const Words near = bits + 0x7fffu + ((bits >> 16) & 1u);
    const Words far = magnitude > 0x7f800000u ? bits | 0x00400000u : bits;  // NaN stays NaN without its lower half
    return reinterpret_cast<F>((magnitude < 0x7f7f8000u ? near : far) & 0xffff0000u);
}

// Takes the nearest bfloat16 from numbers: it is returned, what it leaves is put in their place. Infinity and NaN leave nothing.
inline F take_part(F& x) {
    const F near = finite_bf16(x);
    const Words difference = reinterpret_cast<Words>(sub(x, near)), none = difference ^ difference;
    x = reinterpret_cast<F>((difference & 0x7fffffffu) > 0x7f800000u ? none : difference);
    return near;
}

// 32 numbers as the sums of `parts` bfloat16 each, a line of a tile for each part.
inline void take_apart(const float* x, int64_t parts, char* line, int64_t part_bytes) {
    for (int i = 0; i < kTileSide; i += W) {
        F rest[2] = {load(x + i), load(x + kTileSide + i)};
        for (int64_t part = 0; part < parts; ++part) {
            const F near[2] = {take_part(rest[0]), take_part(rest[1])};
            store_upper_halves(line + part * part_bytes + i * 4, near[0], near[1]);
        }
    }
}

// Columns become rows, to_stride apart.
inline void turn_tile(const float* tile, float* to, int64_t to_stride = kTileSide) {
    for (int64_t i = 0; i < kTileSide; i += W)
        for (int64_t j = 0; j < kTileSide; j += W) {
            F square[W];
            for (int r = 0; r < W; ++r) square[r] = load(tile + (i + r) * kTileSide + j);
            transpose(square);
            for (int r = 0; r < W; ++r) store(to + (j + r) * to_stride + i, square[r]);
        }
}

// The lines of `count` tiles become columns.
inline void turn_lines(float* tiles, int64_t count) {
    for (int64_t tile = 0; tile < count; ++tile) {
        alignas(64) float turned[kTileFloats];
        turn_tile(tiles + tile * kTileFloats, turned);
        std::memcpy(tiles + tile * kTileFloats, turned, sizeof turned);
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

// A row of integers, block by block; its bytes are the parts, of which `line` has the first.
inline void store_integers(const Linear& linear, const TileInputs& inputs, const float* row, float row_scale, float* scales,
                           char* line) {
    for (int64_t start = 0; start < inputs.width; start += kInputBlock, scales += kTokenGroup) {
        int16_t values[kInputBlock];
        *scales = row_scale * round_block(row + start, linear.stage.rounding, kLargestInTwoBytes, values);
        order_as_weights(linear.weight, values);
        int8_t bytes[2][kInputBlock];  // high and low; or the only ones
        for (int i = 0; i < kInputBlock; ++i) {
            const auto low = static_cast<int8_t>(values[i] & 255);
            bytes[0][i] = static_cast<int8_t>(inputs.parts == 2 ? (values[i] - low) >> 8 : low);
            bytes[1][i] = low;
        }
        for (int64_t part = 0; part < inputs.parts; ++part)
            for (int64_t step = 0; step < kInputBlock / 64; ++step)
                std::memcpy(line + part * inputs.part_bytes() + (start / 64 + step) * kTileBytes, bytes[part] + step * 64, 64);
    }
}

// As Kernels::prepare, where weights are to meet tiles. A token is a line of each tile first, and a column when its group is
// complete. Columns that belong to no token are whatever they were: what a column of sums comes to depends on the same column
// of inputs alone, and nobody looks at theirs.
inline void prepare_tiles(const Linear& linear, const float* x, int64_t begin, int64_t end, float* prepared,
                          float* scratch) {
    const TileInputs inputs = tile_inputs(linear);
    for (int64_t first = begin; first < end; first += kTokenGroup) {
        float* scales = prepared + inputs.scales_at(first / kTokenGroup);
        float* tiles = prepared + inputs.tiles_at(first / kTokenGroup);
        for (int64_t t = first; t < smaller(first + kTokenGroup, end); ++t) {
            char* line = reinterpret_cast<char*>(tiles) + (t - first) * kTileRowBytes;
            normalize(linear.stage, x + t * linear.stage.input_width(), scratch);
            const float row_scale = linear.stage.rounding == Rounding::none ? 1.0f : round_row(linear.stage, scratch);
            if (inputs.integers) {
                store_integers(linear, inputs, scratch, row_scale, scales + (t - first), line);
                continue;
            }
            scales[t - first] = row_scale;
            for (int64_t step = 0; step < inputs.steps; ++step)
                take_apart(scratch + step * 32, inputs.parts, line + step * kTileBytes, inputs.part_bytes());
        }
        turn_lines(tiles, inputs.parts * inputs.steps);
    }
}

}  // namespace nvtripy_portable::ISA

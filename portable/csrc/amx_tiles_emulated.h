// Tiles in plain loops, by the pseudo-code of Intel's Software Developer's Manual, volume 2: LDTILECFG, TILELOADD, TILESTORED,
// TILEZERO, TDPBF16PS, TDPBSSD. What the processor answers with an exception ends the program here.
#pragma once

#include "amx_tiles.h"

namespace nvtripy_portable::ISA {

struct EmulatedTiles {
    alignas(64) uint8_t bytes[kTiles][kTileSide][kTileRowBytes] = {};
    TileShapes shapes;
    bool is_configured = false;
};
inline thread_local EmulatedTiles emulated_tiles;

inline EmulatedTiles& configured_tiles() {
    EmulatedTiles& tiles = emulated_tiles;
    if (!tiles.is_configured) __builtin_trap();
    return tiles;
}

class TileUse {
public:
    explicit TileUse(int depth) {
        emulated_tiles.shapes = tile_shapes(depth);
        emulated_tiles.is_configured = true;
        std::memset(emulated_tiles.bytes, 0, sizeof emulated_tiles.bytes);
    }
    ~TileUse() { emulated_tiles.is_configured = false; }
    TileUse(const TileUse&) = delete;
    TileUse& operator=(const TileUse&) = delete;
};

template <int kTile>
inline void zero_tile() {
    std::memset(configured_tiles().bytes[kTile], 0, kTileBytes);
}

// What lies beyond the tile's shape becomes zero.
template <int kTile>
inline void load_tile(const void* from, int64_t stride) {
    EmulatedTiles& tiles = configured_tiles();
    zero_tile<kTile>();
    for (int row = 0; row < tiles.shapes.rows[kTile]; ++row)
        std::memcpy(tiles.bytes[kTile][row], static_cast<const char*>(from) + row * stride, tiles.shapes.row_bytes[kTile]);
}

template <int kTile>
inline void store_tile(void* to, int64_t stride) {
    const EmulatedTiles& tiles = configured_tiles();
    for (int row = 0; row < tiles.shapes.rows[kTile]; ++row)
        std::memcpy(static_cast<char*>(to) + row * stride, tiles.bytes[kTile][row], tiles.shapes.row_bytes[kTile]);
}

// The numbers of a float32 sum or of a bfloat16 that the instruction sees: subnormal ones are zeros.
inline float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? 0.0f * x : x; }
inline float seen_bf16(uint16_t bits) { return flushed(to_float_bits(static_cast<uint32_t>(bits) << 16)); }

// sum + a * b, rounded once, to the nearest, a half to the even; a zero where that is subnormal. A product of two bfloat16 has
// 16 bits, so double holds it exactly, and its sum with a float32 is the same rounded to 53 bits first. What rounds up to
// the least normal number is no subnormal.
inline float fused(float sum, float a, float b) {
    const double exact = static_cast<double>(a) * static_cast<double>(b) + static_cast<double>(sum);
    return static_cast<float>(__builtin_fabs(exact) < 0x1p-126 - 0x1p-151 ? 0.0 * exact : exact);
}
inline float flushed_sum(float a, float b) { return fused(a, b, 1.0f); }

template <int kSums, int kA, int kB>
inline void expect_shapes(const EmulatedTiles& tiles) {
    const TileShapes& s = tiles.shapes;
    if (s.rows[kSums] != s.rows[kA] || s.row_bytes[kSums] != s.row_bytes[kB] || s.row_bytes[kA] != 4 * s.rows[kB])
        __builtin_trap();
}

// Each row of sums begins at zero, one for the even and one for the odd number of pairs; both together are added to the tile.
template <int kSums, int kA, int kB>
inline void dot_bf16() {
    EmulatedTiles& tiles = configured_tiles();
    expect_shapes<kSums, kA, kB>(tiles);
    const int depth = tiles.shapes.rows[kB];
    alignas(64) float b[kTileSide][2][kTileSide];
    for (int k = 0; k < depth; ++k) {
        uint16_t pairs[2 * kTileSide];
        std::memcpy(pairs, tiles.bytes[kB][k], sizeof pairs);
        for (int n = 0; n < kTileSide; ++n)
            for (int odd = 0; odd < 2; ++odd) b[k][odd][n] = seen_bf16(pairs[2 * n + odd]);
    }
    for (int m = 0; m < tiles.shapes.rows[kSums]; ++m) {
        alignas(64) float run[2][kTileSide] = {};
        uint16_t a[2 * kTileSide];
        std::memcpy(a, tiles.bytes[kA][m], sizeof a);
        for (int k = 0; k < depth; ++k)
            for (int odd = 0; odd < 2; ++odd) {
                const float by = seen_bf16(a[2 * k + odd]);
                for (int n = 0; n < kTileSide; ++n) run[odd][n] = fused(run[odd][n], by, b[k][odd][n]);
            }
        float sums[kTileSide];
        std::memcpy(sums, tiles.bytes[kSums][m], sizeof sums);
        for (int n = 0; n < kTileSide; ++n) sums[n] = flushed_sum(flushed(sums[n]), flushed_sum(run[0][n], run[1][n]));
        std::memcpy(tiles.bytes[kSums][m], sums, sizeof sums);
    }
}

// Sums wrap around, as the processor's do.
template <int kSums, int kA, int kB>
inline void dot_i8() {
    EmulatedTiles& tiles = configured_tiles();
    expect_shapes<kSums, kA, kB>(tiles);
    const int depth = tiles.shapes.rows[kB];
    alignas(64) int16_t b[kTileSide][4][kTileSide];
    for (int k = 0; k < depth; ++k)
        for (int n = 0; n < kTileSide; ++n)
            for (int i = 0; i < 4; ++i) b[k][i][n] = static_cast<int8_t>(tiles.bytes[kB][k][4 * n + i]);
    for (int m = 0; m < tiles.shapes.rows[kSums]; ++m) {
        uint32_t sums[kTileSide];
        std::memcpy(sums, tiles.bytes[kSums][m], sizeof sums);
        for (int k = 0; k < depth; ++k)
            for (int i = 0; i < 4; ++i) {
                const int16_t by = static_cast<int8_t>(tiles.bytes[kA][m][4 * k + i]);
                for (int n = 0; n < kTileSide; ++n) sums[n] += static_cast<uint32_t>(by * b[k][i][n]);
            }
        std::memcpy(tiles.bytes[kSums][m], sums, sizeof sums);
    }
}

}  // namespace nvtripy_portable::ISA

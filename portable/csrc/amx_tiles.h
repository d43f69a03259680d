// Tiles: registers of 16 rows of 64 bytes, of which one instruction multiplies two and adds what comes out to a third. A is
// 16 rows of numbers; B has four bytes of 16 columns in each row, so that row k meets bytes 4 k to 4 k + 3 of A's rows; sums
// are 16 rows of 16 columns. Everything that knows the processor's AMX stands here. amx_tiles_emulated.h is the same in plain
// loops, for every other processor: it says what each operation means.
//
// Tiles 0 to 3 are sums, 4 and 5 rows of A, 6 and 7 columns of B.
#pragma once

#include <cstdint>

#include "simd.h"

namespace nvtripy_portable::ISA {

constexpr int64_t kTileSide = 16;  // rows of a tile, and columns of sums
constexpr int64_t kTileRowBytes = 64;
constexpr int64_t kTileBytes = kTileSide * kTileRowBytes;
constexpr int64_t kTileFloats = kTileBytes / 4;
constexpr int kTiles = 8, kFirstA = 4, kFirstB = 6;

// What the processor is told of its tiles: of each, how many rows, and how many bytes in one.
struct alignas(64) TileShapes {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};
static_assert(sizeof(TileShapes) == 64);

// For products of which each adds `depth` bytes of A's rows: 64, or 32.
inline TileShapes tile_shapes(int depth) {
    TileShapes shapes;
    for (int tile = 0; tile < kTiles; ++tile) {
        const bool is_a = tile >= kFirstA && tile < kFirstB, is_b = tile >= kFirstB;
        shapes.row_bytes[tile] = static_cast<uint16_t>(is_a ? depth : kTileRowBytes);
        shapes.rows[tile] = static_cast<uint8_t>(is_b ? depth / 4 : kTileSide);
    }
    return shapes;
}

}  // namespace nvtripy_portable::ISA

#if ISA_TILES == 2
#include "amx_tiles_emulated.h"
#else

namespace nvtripy_portable::ISA {

// The calling thread's tiles, from here to the end of the scope. Threads are ours or a caller's, whose own libraries may use
// tiles too: nothing is taken for granted at the beginning (200 cycles; a kernel's call takes thousands), nothing stays.
class TileUse {
public:
    explicit TileUse(int depth) {
        const TileShapes shapes = tile_shapes(depth);
        asm volatile("ldtilecfg %0" : : "m"(shapes));
    }
    ~TileUse() { asm volatile("tilerelease"); }
    TileUse(const TileUse&) = delete;
    TileUse& operator=(const TileUse&) = delete;
};

// Instructions instead of the compiler's intrinsics: GCC's are macros that want the tile's number as a digit in the source, and
// they do not say that a load reads memory, so that stores could be moved behind it.
template <int kTile>
inline void zero_tile() { asm volatile("tilezero %%tmm%c0" : : "i"(kTile)); }

template <int kTile>
inline void load_tile(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
inline void store_tile(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
}

template <int kSums, int kA, int kB>
inline void dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kA), "i"(kB));
}

template <int kSums, int kA, int kB>
inline void dot_i8() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kA), "i"(kB));
}

}  // namespace nvtripy_portable::ISA
#endif

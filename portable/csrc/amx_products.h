// Products of tiles: a panel's rows (amx_weights.h) with columns of up to 256 tokens (amx_inputs.h), into tiles of sums that
// stand in memory.
#pragma once

#include "amx_inputs.h"
#include "amx_tiles.h"
#include "amx_weights.h"
#include "kernels.h"

namespace nvtripy_portable::ISA {

constexpr int64_t kGroupsTogether = kPanelTokens / kTokenGroup;

// Up to 2 x 2 tiles of sums, the rows' first.
template <int kRows>
inline void load_rows(const char* first, const char* second, int64_t stride) {
    load_tile<kFirstA>(first, stride);
    if constexpr (kRows == 2) load_tile<kFirstA + 1>(second, stride);
}
template <int kColumns>
inline void load_columns(const char* const (&columns)[2], int64_t offset) {
    load_tile<kFirstB>(columns[0] + offset, kTileRowBytes);
    if constexpr (kColumns == 2) load_tile<kFirstB + 1>(columns[1] + offset, kTileRowBytes);
}
template <int kRows, int kColumns, bool kIntegers>
inline void add_products() {
    const auto add = []<int kRow, int kColumn>() __attribute__((always_inline)) {
        if constexpr (kIntegers) dot_i8<2 * kRow + kColumn, kFirstA + kRow, kFirstB + kColumn>();
        else dot_bf16<2 * kRow + kColumn, kFirstA + kRow, kFirstB + kColumn>();
    };
    add.template operator()<0, 0>();
    if constexpr (kColumns == 2) add.template operator()<0, 1>();
    if constexpr (kRows == 2) add.template operator()<1, 0>();
    if constexpr (kRows == 2 && kColumns == 2) add.template operator()<1, 1>();
}
// visit<kTile>(row, column) for each tile of sums.
template <int kRows, int kColumns, class Visit>
inline void each_sum(const Visit& visit) {
    visit.template operator()<0>(0, 0);
    if constexpr (kColumns == 2) visit.template operator()<1>(0, 1);
    if constexpr (kRows == 2) visit.template operator()<2>(1, 0);
    if constexpr (kRows == 2 && kColumns == 2) visit.template operator()<3>(1, 1);
}

// What a kernel call works on: a panel's rows, and groups of tokens.
struct TileWork {
    PanelTiles panel;
    int parts;                             // of the inputs
    int64_t part_bytes;                    // from a part to the next one
    bool goes_on;                          // sums are added to, or begin
    int64_t groups;
    const char* tiles[kGroupsTogether];    // each one's first
    const float* scales[kGroupsTogether];  // each one's of the first block, integers'
    float* sums;                           // a tile for each 16 rows and each group
    float* sums_at(int64_t rows, int64_t group) const { return sums + (rows * groups + group) * kTileFloats; }
};

// Adds a step's 32 numbers, in the one order in which tiles add floats: a weight's high half with the parts of the input, the
// smallest first, then its low half. `tile(row, side)` is a tile of weights; the columns' tiles are `offset` bytes on.
template <int kRows, int kColumns, int kSides, int kParts, class Tile>
inline void add_step(const Tile& tile, const char* const (&columns)[2], int64_t offset, int64_t part_bytes) {
    load_rows<kRows>(tile(0, 0), tile(kRows - 1, 0), kTileRowBytes);
#pragma GCC unroll 3
    for (int part = kParts - 1; part >= 0; --part) {
        load_columns<kColumns>(columns, offset + part * part_bytes);
        add_products<kRows, kColumns, false>();
    }
    if constexpr (kSides == 2) {
        load_rows<kRows>(tile(0, 1), tile(kRows - 1, 1), kTileRowBytes);
        add_products<kRows, kColumns, false>();
    }
}

// Adds a panel's floats.
template <int kRows, int kColumns, int kSides, int kParts>
inline void add_floats(const TileWork& work, int64_t rows, int64_t group) {
    const char* const columns[2] = {work.tiles[group], work.tiles[group + kColumns - 1]};
    each_sum<kRows, kColumns>([&]<int kTile>(int64_t r, int64_t c) __attribute__((always_inline)) {
        if (!work.goes_on) zero_tile<kTile>();
        else load_tile<kTile>(work.sums_at(rows + r, group + c), kTileRowBytes);
    });
    for (int64_t step = 0; step < work.panel.depth / 32; ++step) {
        add_step<kRows, kColumns, kSides, kParts>([&](int row, int side) { return work.panel.at(rows + row, step, side); }, columns,
                                                  (work.panel.first / 32 + step) * kTileBytes, work.part_bytes);
    }
    each_sum<kRows, kColumns>([&]<int kTile>(int64_t r, int64_t c) __attribute__((always_inline)) {
        store_tile<kTile>(work.sums_at(rows + r, group + c), kTileRowBytes);
    });
}

// add<kRows, kGroups>(rows, group) for all tiles of sums: of two times 16 rows and of kMost groups, or fewer at the end.
template <int kMost, class Add>
inline void each_pair(int64_t row_tiles, int64_t groups, const Add& add) {
    for (int64_t group = 0; group < groups; group += kMost) {
        const bool two_groups = kMost == 2 && group + 2 <= groups;
        for (int64_t rows = 0; rows < row_tiles; rows += 2) {
            const bool two_rows = rows + 2 <= row_tiles;
            if (two_rows && two_groups) add.template operator()<2, 2>(rows, group);
            else if (two_rows) add.template operator()<2, 1>(rows, group);
            else if (two_groups) add.template operator()<1, 2>(rows, group);
            else add.template operator()<1, 1>(rows, group);
        }
    }
}

template <int kSides, int kParts>
inline void add_float_parts(const TileWork& work, int64_t row_tiles) {
    each_pair<2>(row_tiles, work.groups, [&]<int kRows, int kGroups>(int64_t rows, int64_t group) {
        add_floats<kRows, kGroups, kSides, kParts>(work, rows, group);
    });
}

// `sides` are those of the panel's numbers.
inline void add_float_panel(const TileWork& work, int sides, int64_t row_tiles) {
    if (sides == 2) {
        if (work.parts == 2) add_float_parts<2, 2>(work, row_tiles);
        else add_float_parts<2, 1>(work, row_tiles);
    } else {
        if (work.parts == 3) add_float_parts<1, 3>(work, row_tiles);
        else if (work.parts == 2) add_float_parts<1, 2>(work, row_tiles);
        else add_float_parts<1, 1>(work, row_tiles);
    }
}

}  // namespace nvtripy_portable::ISA

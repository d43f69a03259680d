// Linear operations with tiles: weights are the rows, inputs the columns. Up to 64 rows of weights, 128 numbers at a time,
// become tiles (amx_weights.h) and meet the columns of up to 256 tokens (amx_inputs.h); the sums wait in scratch memory for
// the next 128 numbers.
//
// Prompts, and more than a few generated tokens where weights are integers. A few of those meet rows of weights as they are
// (amx_rows.h): a tile takes as long for one token as for 16, and more for converting the weights than memory takes to bring
// them. The bits are the same, as sums of integers are exact. Those of floats are not, so generated tokens meet floats
// without tiles (products.h), however many there are: on an Emerald Rapids tiles gave one token 45 % of the speed (float16,
// 124M; 32 of them 190 %).
//
// A sum takes its terms in one order, whatever is computed beside it: a step of 32 or 64 numbers after the other; in a step,
// of floats, a weight's high half with the parts of the input, the smallest first, then its low half. Of integers the sum of
// a block, or of what shares a scale, is exact, both bytes of the inputs together; it becomes float32, gets its scales and is
// added.
#pragma once

#include "amx_inputs.h"
#include "amx_rows.h"
#include "amx_tiles.h"
#include "amx_weights.h"
#include "kernels.h"
#include "linear.h"
#include "simd.h"

namespace nvtripy_portable::ISA {

constexpr int64_t kTileWeights = 64;          // rows of weights that meet all tokens together, of prompts
constexpr int64_t kTileGeneratedWeights = 32; // the same of generated tokens: so much is asked for ahead
constexpr int64_t kGroupsTogether = kPanelTokens / kTokenGroup;
constexpr int64_t kMostTilesOfGroup = 2;  // of integers; of floats there is one
constexpr int64_t kTileFloats = kTileBytes / 4;
constexpr int64_t kMostSums = kGroupsTogether * kTileWeights * kMostTilesOfGroup / kTileSide;
static_assert(kTileScratch >= kTileWeights * kPanelDepth + kMostSums * kTileFloats);

// Which operations are prepared as this file and amx_rows.h want it. Not generated tokens with floats; nor float32 weights,
// and scales of blocks where inputs stay floats.
inline bool uses_tiles(const Linear& linear, Role role) {
    const Matrix& weight = linear.weight;
    if (linear.integers) return weight.block % 32 == 0;
    return role == Role::prompt && weight.dtype != Dtype::f32 && weight.dtype != Dtype::i4 && !weight.block;
}

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

// What a kernel call works on: a panel's rows, and columns of tokens.
struct TileWork {
    PanelTiles panel;
    TileInputs inputs;
    int64_t first;                                             // number of the panel's
    int64_t columns;                                           // tiles
    const char* tiles[kGroupsTogether * kMostTilesOfGroup];    // their first ones
    const float* scales[kGroupsTogether * kMostTilesOfGroup];  // of the first block, integers'
    float* sums;                                               // a tile for each 16 rows and each tile of columns
    float* sums_at(int64_t rows, int64_t column) const { return sums + (rows * columns + column) * kTileFloats; }
};

// Adds kPanelDepth numbers of floats. Tiles of one part, or parts one by one.
template <int kRows, int kColumns, int kSides, int kParts>
inline void add_floats(const TileWork& work, int64_t rows, int64_t column) {
    const char* const columns[2] = {work.tiles[column], work.tiles[column + kColumns - 1]};
    each_sum<kRows, kColumns>([&]<int kTile>(int64_t r, int64_t c) __attribute__((always_inline)) {
        if (work.first == 0) zero_tile<kTile>();
        else load_tile<kTile>(work.sums_at(rows + r, column + c), kTileRowBytes);
    });
    for (int64_t step = 0; step < work.panel.steps; ++step) {
        const int64_t offset = (work.first / 32 + step) * kTileBytes;
        load_rows<kRows>(work.panel.at(rows, step, 0), work.panel.at(rows + kRows - 1, step, 0), kTileRowBytes);
#pragma GCC unroll 3
        for (int part = kParts - 1; part >= 0; --part) {
            load_columns<kColumns>(columns, offset + part * work.inputs.part_bytes());
            add_products<kRows, kColumns, false>();
        }
        if constexpr (kSides == 2) {
            load_rows<kRows>(work.panel.at(rows, step, 1), work.panel.at(rows + kRows - 1, step, 1), kTileRowBytes);
            add_products<kRows, kColumns, false>();
        }
    }
    each_sum<kRows, kColumns>([&]<int kTile>(int64_t r, int64_t c) __attribute__((always_inline)) {
        store_tile<kTile>(work.sums_at(rows + r, column + c), kTileRowBytes);
    });
}

// Of neighbours, 256 * the first + the second, in the first one's place; what is in the second one's means nothing.
typedef int32_t Integers __attribute__((vector_size(sizeof(F))));
template <size_t... kIndex>
inline Integers both_bytes(Integers x, std::index_sequence<kIndex...>) {
    return x * 256 + __builtin_shufflevector(x, x, (kIndex ^ 1)...);
}

// sums = or += products of one tile, times the columns' scales and, where there are any, the rows'. Where an input has two
// bytes, they are neighbouring columns, and become one number first.
inline void add_scaled(const int32_t* products, bool two_bytes, const float* column_scales, const float* row_scales, float* sums,
                       bool add_to) {
    constexpr int kVectors = static_cast<int>(kTileSide) / W;
    F scales[kVectors];
    for (int v = 0; v < kVectors; ++v) scales[v] = load(column_scales + v * W);
#pragma GCC unroll 4
    for (int m = 0; m < kTileSide; ++m)
        for (int v = 0; v < kVectors; ++v) {
            Integers numbers;
            std::memcpy(&numbers, products + m * kTileSide + v * W, sizeof numbers);
            if (two_bytes) numbers = both_bytes(numbers, std::make_index_sequence<W>());
            I product;
            std::memcpy(&product, &numbers, sizeof product);
            const F by = row_scales ? mul(scales[v], set1(row_scales[m])) : scales[v];
            float* to = sums + m * kTileSide + v * W;
            store(to, add_to ? fma(to_float(product), by, load(to)) : mul(to_float(product), by));
        }
}

// Adds a block of integers, run by run. `row_scales` are those of the runs, one behind the other, of kTileWeights rows each;
// or nullptr.
template <int kRows, int kColumns>
inline void add_integers(const TileWork& work, int64_t run, const float* row_scales, int64_t rows, int64_t column) {
    const char* const columns[2] = {work.tiles[column], work.tiles[column + kColumns - 1]};
    alignas(64) int32_t products[4][kTileFloats];
    const int64_t block_offset = work.first / 64 * kTileBytes;
    for (int64_t start = 0; start < kInputBlock; start += run) {
        each_sum<kRows, kColumns>([&]<int kTile>(int64_t, int64_t) __attribute__((always_inline)) { zero_tile<kTile>(); });
        for (int64_t k = start; k < start + run; k += 64) {
            const int64_t within = k % 64;  // 32: the second half of a tile
            load_rows<kRows>(work.panel.at(rows, k / 64, 0) + within,
                             work.panel.at(rows + kRows - 1, k / 64, 0) + within, kTileRowBytes);
            load_columns<kColumns>(columns, block_offset + k / 64 * kTileBytes + within / 4 * kTileRowBytes);
            add_products<kRows, kColumns, true>();
        }
        each_sum<kRows, kColumns>([&]<int kTile>(int64_t, int64_t) __attribute__((always_inline)) {
            store_tile<kTile>(products[kTile], kTileRowBytes);
        });
        each_sum<kRows, kColumns>([&]<int kTile>(int64_t r, int64_t c) __attribute__((always_inline)) {
            const int64_t scales = work.first / kInputBlock * work.inputs.parts * kTileSide;
            add_scaled(products[kTile], work.inputs.parts == 2, work.scales[column + c] + scales,
                       row_scales ? row_scales + start / run * kTileWeights + (rows + r) * kTileSide : nullptr,
                       work.sums_at(rows + r, column + c), work.first + start > 0);
        });
    }
}

// add<kRows, kColumns>(rows, column) for all tiles of sums, two by two.
template <class Add>
inline void each_pair(int64_t row_tiles, int64_t columns, const Add& add) {
    for (int64_t column = 0; column < columns; column += 2) {
        const bool two_columns = column + 2 <= columns;
        for (int64_t rows = 0; rows < row_tiles; rows += 2) {
            const bool two_rows = rows + 2 <= row_tiles;
            if (two_rows && two_columns) add.template operator()<2, 2>(rows, column);
            else if (two_rows) add.template operator()<2, 1>(rows, column);
            else if (two_columns) add.template operator()<1, 2>(rows, column);
            else add.template operator()<1, 1>(rows, column);
        }
    }
}

template <int kSides, int kParts>
inline void add_float_panel(const TileWork& work, int64_t row_tiles) {
    each_pair(row_tiles, work.columns, [&]<int kRows, int kColumns>(int64_t rows, int64_t column) {
        add_floats<kRows, kColumns, kSides, kParts>(work, rows, column);
    });
}

inline void add_panel(const Linear& linear, const TileWork& work, int64_t begin, int64_t end) {
    const Matrix& weight = linear.weight;
    const int64_t row_tiles = (end - begin + kTileSide - 1) / kTileSide;
    if (linear.integers) {
        const int64_t run = run_of(weight);
        alignas(64) float scales[kInputBlock / 32 * kTileWeights];
        if (weight.block)
            for (int64_t start = 0; start < kInputBlock; start += run)
                for (int64_t n = begin; n < begin + row_tiles * kTileSide; ++n) {
                    // Beyond the weight's end there is nothing to scale.
                    const bool is_there = n < end && work.first + start < weight.width;
                    scales[start / run * kTileWeights + n - begin] =
                        is_there ? weight.scales[n * weight.scale_stride + (work.first + start) / weight.block] : 0.0f;
                }
        each_pair(row_tiles, work.columns, [&]<int kRows, int kColumns>(int64_t rows, int64_t column) {
            add_integers<kRows, kColumns>(work, run, weight.block ? scales : nullptr, rows, column);
        });
        return;
    }
    const int parts = work.inputs.parts;
    if (sides_of(weight) == 2) {
        if (parts == 2) add_float_panel<2, 2>(work, row_tiles);
        else add_float_panel<2, 1>(work, row_tiles);
    } else {
        if (parts == 3) add_float_panel<1, 3>(work, row_tiles);
        else if (parts == 2) add_float_panel<1, 2>(work, row_tiles);
        else add_float_panel<1, 1>(work, row_tiles);
    }
}

// Columns become rows.
inline void turn_tile(const float* tile, float* to) {
    for (int64_t i = 0; i < kTileSide; i += W)
        for (int64_t j = 0; j < kTileSide; j += W) {
            F square[W];
            for (int r = 0; r < W; ++r) square[r] = load(tile + (i + r) * kTileSide + j);
            transpose(square);
            for (int r = 0; r < W; ++r) store(to + (j + r) * kTileSide + i, square[r]);
        }
}

// y of the tokens first <= t < first + count of a group from their sums, which begin at tile `column`.
inline void write_sums(const Linear& linear, const TileWork& work, int64_t column, int64_t count, const float* token_scales,
                       int64_t begin, int64_t end, float* y, int64_t y_stride) {
    const TileInputs& inputs = work.inputs;
    const int64_t columns = inputs.integers ? inputs.parts : 1;  // of a token
    for (int64_t n = begin; n < end; n += kTileSide) {
        const int64_t rows = smaller(kTileSide, end - n);
        alignas(64) float row_scales[kTileSide] = {}, turned[kMostTilesOfGroup][kTileFloats];
        for (int64_t r = 0; r < rows; ++r) row_scales[r] = row_scale_of(linear, n + r);
        for (int64_t tile = 0; tile < inputs.sum_tiles(count); ++tile)
            turn_tile(work.sums_at((n - begin) / kTileSide, column + tile), turned[tile]);
        for (int64_t t = 0; t < count; ++t)
            for (int64_t r = 0; r < rows; r += W) {
                F sum = load(turned[0] + t * columns * kTileSide + r);
                if (token_scales) sum = mul(sum, set1(token_scales[t]));
                sum = mul(sum, load(row_scales + r));
                float* to = y + t * y_stride + (n - begin) + r;
                if (r + W <= rows) store(to, sum);
                else store_part(to, sum, rows - r);
            }
    }
}

// Up to kTileWeights rows of weights and kPanelTokens tokens.
inline void multiply_block(const Linear& linear, Role role, TileWork& work, const float* prepared, int64_t first, int64_t count,
                           int64_t begin, int64_t end, float* y, int64_t y_stride) {
    const Matrix& weight = linear.weight;
    const TileInputs& inputs = work.inputs;
    const int64_t first_group = first / kTokenGroup, groups = (count + kTokenGroup - 1) / kTokenGroup;
    const auto tokens_of = [&](int64_t group) { return smaller(kTokenGroup, count - group * kTokenGroup); };
    work.columns = 0;
    for (int64_t group = 0; group < groups; ++group)
        for (int64_t tile = 0; tile < inputs.sum_tiles(tokens_of(group)); ++tile, ++work.columns) {
            work.tiles[work.columns] = reinterpret_cast<const char*>(prepared + inputs.tiles_at(first_group + group)) +
                                       tile * inputs.part_bytes();
            work.scales[work.columns] = prepared + inputs.scales_at(first_group + group) + tile * kTileSide;
        }
    // What memory is asked for meanwhile. For generated tokens: the next rows, in the order of the memory, as they are read from
    // end to end. For prompts: the next numbers of the same rows, since the next rows' turn comes much later.
    const int64_t row_bytes = weight.row_bytes(), panel_bytes = larger<int64_t>(row_bytes * kPanelDepth / weight.width, 1);
    const auto* rows = static_cast<const char*>(weight.data) + begin * row_bytes;
    const char* ahead = rows + larger((end - begin) * row_bytes, bytes_ahead());
    for (work.first = 0; work.first < weight.width; work.first += kPanelDepth) {
        for (int64_t n = begin; n < end; ++n) {
            if (role == Role::prompt) ahead = rows + (n - begin) * row_bytes + (work.first / kPanelDepth + 1) * panel_bytes;
            for (int64_t i = 0; i < panel_bytes; i += 64) prefetch_later(ahead + i);
            ahead += panel_bytes;
            fill_row(linear, n, work.first, n - begin, work.panel);
        }
        add_panel(linear, work, begin, end);
    }
    for (int64_t group = 0, column = 0; group < groups; column += inputs.sum_tiles(tokens_of(group)), ++group)
        write_sums(linear, work, column, tokens_of(group),
                   inputs.integers ? nullptr : prepared + inputs.scales_at(first_group + group), begin, end,
                   y + group * kTokenGroup * y_stride, y_stride);
}

inline int64_t prepared_floats_for_tiles(const Linear& linear, Role role, int64_t tokens) {
    if (!uses_tiles(linear, role)) return prepared_floats(linear, role, tokens);
    if (meets_rows(role, tokens)) return tokens * integer_row_floats(linear.stage.width);
    return (tokens + kTokenGroup - 1) / kTokenGroup * tile_inputs(linear).group_floats();
}

inline void prepare_for_tiles(const Linear& linear, Role role, const float* x, int64_t tokens, int64_t begin, int64_t end,
                              float* prepared, float* scratch) {
    if (uses_tiles(linear, role)) {
        if (meets_rows(role, tokens)) prepare_rows(linear, x, begin, end, prepared, scratch);
        else prepare_tiles(linear, x, begin, end, prepared, scratch);
    } else prepare_tokens(linear, role, x, tokens, begin, end, prepared, scratch);
}

inline void multiply_with_tiles(const Linear& linear, Role role, const float* prepared, int64_t tokens, int64_t first,
                                int64_t count, int64_t begin, int64_t end, float* y, int64_t y_stride, float* scratch) {
    if (!uses_tiles(linear, role)) {
        multiply(linear, role, prepared, tokens, first, count, begin, end, y, y_stride, scratch);
        return;
    }
    if (meets_rows(role, tokens)) {
        multiply_rows(linear, prepared + first * integer_row_floats(linear.stage.width), count, begin, end, y, y_stride);
        return;
    }
    TileWork work;
    work.inputs = tile_inputs(linear);
    work.panel = {reinterpret_cast<char*>(scratch), kPanelDepth / work.inputs.step_numbers, sides_of(linear.weight)};
    work.sums = scratch + kTileWeights * kPanelDepth;
    const TileUse use(linear.integers && run_of(linear.weight) == 32 ? 32 : 64);
    const int64_t together = role == Role::prompt ? kTileWeights : kTileGeneratedWeights;
    for (int64_t t = 0; t < count; t += kPanelTokens)
        for (int64_t n = begin; n < end; n += together)
            multiply_block(linear, role, work, prepared, first + t, smaller(kPanelTokens, count - t), n,
                           smaller(n + together, end), y + t * y_stride + (n - begin), y_stride);
}

}  // namespace nvtripy_portable::ISA

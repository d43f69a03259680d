// Linear operations with tiles: weights are the rows, inputs the columns. Up to 128 rows of weights, 512 numbers at a time,
// become tiles (amx_weights.h) and meet the columns of up to 256 tokens (amx_inputs.h); the sums wait in scratch memory for
// the next 512 numbers. All of it, with the inputs' part, fits the second-level cache (2 MB on every processor with AMX).
// On an Emerald Rapids bare loops of the same loads, products and stores give 2.9 TFLOP/s a thread from registers, and by
// rows x numbers: 64 x 128 2.0 TFLOP/s, 64 x 512 2.5, 128 x 512 2.35, but for inputs 3072 wide, which come from the third-level
// cache once for all rows of a panel, 1.45, 1.5 and 1.9; other sizes between, and 512 tokens instead of 256 less.
//
// That is for prompts, and for many generated tokens that meet integers. A few of those do so without tiles (amx_rows.h), to the
// same bits, as sums of integers are exact: a tile takes as long for one token as for 16.
//
// A sum takes its terms in one order, whatever is computed beside it: a step of 32 or 64 numbers after the other; in a step,
// of floats, a weight's high half with the parts of the input, the smallest first, then its low half. Of integers the sum of
// a block, or of what shares a scale, is exact, both bytes of the inputs together; it becomes float32, gets its scales and is
// added.
#pragma once

#include "amx_inputs.h"
#include "amx_products.h"
#include "amx_rows.h"
#include "amx_streams.h"
#include "amx_tiles.h"
#include "amx_weights.h"
#include "kernels.h"
#include "linear.h"
#include "simd.h"

namespace nvtripy_portable::ISA {

constexpr int64_t kShallowDepth = 256;  // integers, and generated tokens: what is used again fits the first-level cache
static_assert(kTileDepth % kInputBlock == 0 && kTileWeights % kTileSide == 0);

// Which operations are prepared as these files want it. Not float32 weights, nor int4 and scales of blocks where inputs stay
// floats. A tile's sum of floats has an order that vectors cannot take as fast, so generated tokens meet floats in one way or
// in the other, however many they are: without tiles (products.h), which is faster for one to four of them; or, with kBatch,
// in tiles (amx_streams.h).
template <bool kBatch>
inline bool uses_tiles(const Linear& linear, Role role) {
    const Matrix& weight = linear.weight;
    if (linear.integers) return weight.block % 32 == 0;
    if (role == Role::generated && !kBatch) return false;
    return weight.dtype != Dtype::f32 && weight.dtype != Dtype::i4 && !weight.block;
}

// Of those: whether all the tokens of a role are so few that they meet rows.
inline bool meets_rows(const Linear& linear, Role role, int64_t tokens) {
    return linear.integers && role == Role::generated && tokens <= kRowTokens;
}

// sums = or += products of one tile, or 256 * those of the first + those of the second, times the columns' scales and, where
// there are any, the rows'.
template <int kParts>
inline void add_scaled(const int32_t* products, const int32_t* low, const float* column_scales, const float* row_scales,
                       float* sums, bool add_to) {
    constexpr int kVectors = static_cast<int>(kTileSide) / W;
    F scales[kVectors];
    for (int v = 0; v < kVectors; ++v) scales[v] = load(column_scales + v * W);
#pragma GCC unroll 4
    for (int m = 0; m < kTileSide; ++m)
        for (int v = 0; v < kVectors; ++v) {
            const int64_t at = m * kTileSide + v * W;
            Integers numbers;
            std::memcpy(&numbers, products + at, sizeof numbers);
            if constexpr (kParts == 2) {
                Integers second;
                std::memcpy(&second, low + at, sizeof second);
                numbers = numbers * 256 + second;
            }
            I product;
            std::memcpy(&product, &numbers, sizeof product);
            const F by = row_scales ? mul(scales[v], set1(row_scales[m])) : scales[v];
            store(sums + at, add_to ? fma(to_float(product), by, load(sums + at)) : mul(to_float(product), by));
        }
}

// Adds a panel's integers, run by run: of two groups, or of the two parts of one. A run's sums are scaled while the next one's
// come. `row_scales` are those of the runs, one behind the other, of kTileWeights rows each; or nullptr.
template <int kRows, int kColumns, int kParts>
inline void add_integers(const TileWork& work, int64_t run, const float* row_scales, int64_t rows, int64_t group) {
    constexpr int kGroups = kParts == 2 ? 1 : kColumns;
    const char* const columns[2] = {
        work.tiles[group], kParts == 2 ? work.tiles[group] + work.part_bytes : work.tiles[group + kColumns - 1]};
    alignas(64) int32_t products[2][4][kTileFloats];
    const auto scale = [&](int64_t start) __attribute__((always_inline)) {
        const auto& sums = products[start / run % 2];
        for (int r = 0; r < kRows; ++r)
            for (int g = 0; g < kGroups; ++g)
                add_scaled<kParts>(sums[2 * r + g], sums[2 * r + 1],
                                   work.scales[group + g] + (work.panel.first + start) / kInputBlock * kTokenGroup,
                                   row_scales ? row_scales + start / run * kTileWeights + (rows + r) * kTileSide : nullptr,
                                   work.sums_at(rows + r, group + g), work.panel.first + start > 0);
    };
    for (int64_t start = 0; start < work.panel.depth; start += run) {
        each_sum<kRows, kColumns>([&]<int kTile>(int64_t, int64_t) __attribute__((always_inline)) { zero_tile<kTile>(); });
        for (int64_t k = start; k < start + run; k += 64) {
            const int64_t within = k % 64;  // 32: the second half of a tile
            load_rows<kRows>(work.panel.at(rows, k / 64, 0) + within,
                             work.panel.at(rows + kRows - 1, k / 64, 0) + within, kTileRowBytes);
            load_columns<kColumns>(columns, (work.panel.first + k) / 64 * kTileBytes + within / 4 * kTileRowBytes);
            add_products<kRows, kColumns, true>();
        }
        if (start > 0) scale(start - run);
        each_sum<kRows, kColumns>([&]<int kTile>(int64_t, int64_t) __attribute__((always_inline)) {
            store_tile<kTile>(products[start / run % 2][kTile], kTileRowBytes);
        });
    }
    scale(work.panel.depth - run);
}

inline void add_integer_panel(const Matrix& weight, const TileWork& work, int64_t row_tiles, int64_t begin, int64_t end) {
    const int64_t run = run_of(weight);
    alignas(64) float scales[kTileDepth / 32 * kTileWeights];
    if (weight.block)
        for (int64_t start = 0; start < work.panel.depth; start += run)
            for (int64_t n = begin; n < begin + row_tiles * kTileSide; ++n) {
                // Beyond the weight's end there is nothing to scale.
                const bool is_there = n < end && work.panel.first + start < weight.width;
                scales[start / run * kTileWeights + n - begin] =
                    is_there ? weight.scales[n * weight.scale_stride + (work.panel.first + start) / weight.block] : 0.0f;
            }
    const float* row_scales = weight.block ? scales : nullptr;
    if (work.parts == 2)
        each_pair<1>(row_tiles, work.groups, [&]<int kRows, int>(int64_t rows, int64_t group) {
            add_integers<kRows, 2, 2>(work, run, row_scales, rows, group);
        });
    else
        each_pair<2>(row_tiles, work.groups, [&]<int kRows, int kGroups>(int64_t rows, int64_t group) {
            add_integers<kRows, kGroups, 1>(work, run, row_scales, rows, group);
        });
}

inline void add_panel(const Linear& linear, const TileWork& work, int64_t begin, int64_t end) {
    const Matrix& weight = linear.weight;
    const int64_t row_tiles = (end - begin + kTileSide - 1) / kTileSide;
    if (linear.integers) add_integer_panel(weight, work, row_tiles, begin, end);
    else add_float_panel(work, sides_of(weight), row_tiles);
}

// Lines of memory that are going to be written have to be there first: they are asked for a group ahead.
inline void ask_for_lines(const float* y, int64_t y_stride, int64_t count, int64_t rows) {
    for (int64_t t = 0; t < count; ++t)
        for (int64_t n = 0; n < rows; n += kTileSide) __builtin_prefetch(y + t * y_stride + n, 1);
}

// y of `count` tokens of a group.
inline void write_sums(const Linear& linear, const TileWork& work, int64_t group, int64_t count, const float* token_scales,
                       int64_t begin, int64_t end, float* y, int64_t y_stride) {
    for (int64_t n = begin; n < end; n += kTileSide) {
        const int64_t rows = smaller(kTileSide, end - n);
        alignas(64) float row_scales[kTileSide] = {}, turned[kTileFloats];
        for (int64_t r = 0; r < rows; ++r) row_scales[r] = row_scale_of(linear, n + r);
        turn_tile(work.sums_at((n - begin) / kTileSide, group), turned);
        for (int64_t t = 0; t < count; ++t)
            for (int64_t r = 0; r < rows; r += W) {
                F sum = load(turned + t * kTileSide + r);
                if (token_scales) sum = mul(sum, set1(token_scales[t]));
                sum = mul(sum, load(row_scales + r));
                float* to = y + t * y_stride + (n - begin) + r;
                if (r + W <= rows) store(to, sum);
                else store_part(to, sum, rows - r);
            }
    }
}

// All sums of up to kTileWeights rows, panel by panel of `depth` numbers.
inline void add_panels(const Linear& linear, Role role, int64_t depth, TileWork& work, int64_t begin, int64_t end) {
    // What memory is asked for meanwhile. For generated tokens: the next rows, in the order of the memory, as they are read from
    // end to end. For prompts, whose next rows' turn comes much later: the next numbers of the same rows, or the first ones of
    // the next rows.
    const Matrix& weight = linear.weight;
    const int64_t row_bytes = weight.row_bytes(), rows = end - begin;
    const auto* data = static_cast<const char*>(weight.data) + begin * row_bytes;
    const char* ahead = data + larger(rows * row_bytes, bytes_ahead());
    PanelTiles& panel = work.panel;
    for (panel.first = 0; panel.first < weight.width; panel.first += panel.depth) {
        panel.depth = smaller(depth, padded_width(weight.width) - panel.first);
        work.goes_on = panel.first > 0;
        const int64_t next = panel.first + panel.depth < weight.width ? panel.first + panel.depth : 0;
        const int64_t asked = smaller(depth, weight.width - (role == Role::prompt ? next : panel.first));
        const int64_t bytes = larger<int64_t>(row_bytes * asked / weight.width, 1);
        for (int64_t r = 0; r < rows; ++r) {
            if (role == Role::prompt) ahead = data + (next ? r : rows + r) * row_bytes + row_bytes * next / weight.width;
            for (int64_t i = 0; i < bytes; i += 64) prefetch_later(ahead + i);
            ahead += bytes;
            fill_row(linear, begin + r, r, panel);
        }
        add_panel(linear, work, begin, end);
    }
}

// Up to kTileWeights rows of weights and kPanelTokens tokens.
inline void multiply_block(const Linear& linear, Role role, TileWork& work, const float* prepared, int64_t first, int64_t count,
                           int64_t begin, int64_t end, float* y, int64_t y_stride) {
    const TileInputs inputs = tile_inputs(linear);
    const int64_t first_group = first / kTokenGroup;
    work.groups = (count + kTokenGroup - 1) / kTokenGroup;
    for (int64_t group = 0; group < work.groups; ++group) {
        work.tiles[group] = reinterpret_cast<const char*>(prepared + inputs.tiles_at(first_group + group));
        work.scales[group] = prepared + inputs.scales_at(first_group + group);
    }
    if (role == Role::generated && !linear.integers && work.groups <= kStreamedGroups) {
        stream_floats(linear.weight, work, begin, end - begin);
    } else {
        const int64_t depth = role == Role::prompt && !linear.integers ? kTileDepth : kShallowDepth;
        work.panel.steps = depth / inputs.step_numbers;
        add_panels(linear, role, depth, work, begin, end);
    }
    for (int64_t group = 0; group < work.groups; ++group) {
        ask_for_lines(y + (group + 1) * kTokenGroup * y_stride, y_stride,
                      smaller(kTokenGroup, count - (group + 1) * kTokenGroup), end - begin);
        write_sums(linear, work, group, smaller(kTokenGroup, count - group * kTokenGroup),
                   inputs.integers ? nullptr : work.scales[group], begin, end, y + group * kTokenGroup * y_stride, y_stride);
    }
}

template <bool kBatch>
inline int64_t prepared_floats_for_tiles(const Linear& linear, Role role, int64_t tokens) {
    if (!uses_tiles<kBatch>(linear, role)) return prepared_floats(linear, role, tokens);
    if (meets_rows(linear, role, tokens)) return tokens * integer_row_floats(linear.stage.width);
    return (tokens + kTokenGroup - 1) / kTokenGroup * tile_inputs(linear).group_floats();
}

template <bool kBatch>
inline void prepare_for_tiles(const Linear& linear, Role role, const float* x, int64_t tokens, int64_t begin, int64_t end,
                              float* prepared, float* scratch) {
    if (uses_tiles<kBatch>(linear, role)) {
        if (meets_rows(linear, role, tokens)) prepare_rows(linear, x, begin, end, prepared, scratch);
        else prepare_tiles(linear, x, begin, end, prepared, scratch);
    } else prepare_tokens(linear, role, x, tokens, begin, end, prepared, scratch);
}

template <bool kBatch>
inline void multiply_with_tiles(const Linear& linear, Role role, const float* prepared, int64_t tokens, int64_t first,
                                int64_t count, int64_t begin, int64_t end, float* y, int64_t y_stride, float* scratch) {
    if (!uses_tiles<kBatch>(linear, role)) {
        const int64_t together = role == Role::prompt ? kPanelColumns : end - begin;
        for (int64_t n = begin; n < end; n += together)
            multiply(linear, role, prepared, tokens, first, count, n, smaller(n + together, end), y + (n - begin), y_stride,
                     scratch);
        return;
    }
    if (meets_rows(linear, role, tokens)) {
        multiply_rows(linear, prepared + first * integer_row_floats(linear.stage.width), count, begin, end, y, y_stride);
        return;
    }
    TileWork work;
    const TileInputs inputs = tile_inputs(linear);
    work.parts = inputs.parts;
    work.part_bytes = inputs.part_bytes();
    work.panel = {reinterpret_cast<char*>(scratch), 0, sides_of(linear.weight), 0, 0};
    work.sums = scratch + kTileWeights * kTileDepth;
    const TileUse use(linear.integers && run_of(linear.weight) == 32 ? 32 : 64);
    const int64_t together = role == Role::prompt ? kTileWeights : kStreamedRows;
    for (int64_t t = 0; t < count; t += kPanelTokens)
        for (int64_t n = begin; n < end; n += together)
            multiply_block(linear, role, work, prepared, first + t, smaller(kPanelTokens, count - t), n, smaller(n + together, end),
                           y + t * y_stride + (n - begin), y_stride);
}

}  // namespace nvtripy_portable::ISA

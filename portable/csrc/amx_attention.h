// Attention of many queries with tiles: 64 keys are the rows and queries the columns of a first product (amx_products.h),
// whose sums stand as (key, query), so that a softmax's steps are steps of 16 queries side by side; queries' weights are the
// rows and values the columns of a second. Halves and parts as in amx_inputs.h: queries and weights are two bfloat16, 16 bits
// of 24, keys and values as many as they need.
//
// Where keys and values are float16 or bfloat16 and a head has a multiple of 32 dimensions; elsewhere attention_tiles.h.
#pragma once

#include "amx_products.h"
#include "attention.h"
#include "attention_tiles.h"
#include "kernels.h"
#include "simd.h"

namespace nvtripy_portable::ISA {

constexpr int64_t kKeyTile = 64;
constexpr int64_t kKeyTiles = kKeyTile / kTileSide, kKeySteps = kKeyTile / 32;
constexpr int64_t kQueryGroups = kQueryBlock / kTileSide;
constexpr int64_t kMostTiledHead = 256;
static_assert(kQueryBlock % kTileSide == 0);

inline bool attends_with_tiles(const Attention& attention) {
    return (attention.dtype == Dtype::f16 || attention.dtype == Dtype::bf16) && attention.head_size % 32 == 0 &&
           attention.head_size <= kMostTiledHead;
}

// Where everything stands in the scratch memory, in floats.
struct AttentionScratch {
    int64_t steps;  // of a head
    constexpr int64_t queries_at() const { return 0; }
    constexpr int64_t keys_at() const { return kQueryGroups * 2 * steps * kTileFloats; }
    constexpr int64_t scores_at() const { return keys_at() + kKeyTiles * 2 * steps * kTileFloats; }
    constexpr int64_t weights_at() const { return scores_at() + kKeyTiles * kQueryGroups * kTileFloats; }
    constexpr int64_t values_at() const { return weights_at() + kQueryGroups * kKeySteps * 2 * kTileFloats; }
    constexpr int64_t sums_at() const { return values_at() + 2 * steps * 2 * kKeySteps * kTileFloats; }
    constexpr int64_t nothing_at() const { return sums_at() + kQueryGroups * 2 * steps * kTileFloats; }
    constexpr int64_t floats() const { return nothing_at() + steps * 32; }
};
static_assert(AttentionScratch{1}.floats() <= attend_block_floats(32));
static_assert(AttentionScratch{kMostTiledHead / 32}.floats() <= attend_block_floats(kMostTiledHead));

// 16 softmaxes under way, side by side; and what was to be multiplied by `factors` when a larger score came.
struct Softmaxes {
    alignas(64) float largest[kTileSide], totals[kTileSide], factors[kTileSide];
    int32_t begin[kTileSide], end[kTileSide];  // the keys that each sees
};

// Makes weights of the scores of kKeyTile keys, from number `first` on, and tells the softmaxes about them. `score(key)` is
// where those of 16 queries stand. Where kAll, all keys are seen by all queries.
template <bool kAll, class Score>
inline void weigh_group(const Score& score, int64_t first, float score_scale, Softmaxes& softmaxes) {
    const F lowest = set1(-__builtin_inff()), scale = set1(score_scale);
    for (int q = 0; q < kTileSide; q += W) {
        Integers begin, end;
        std::memcpy(&begin, softmaxes.begin + q, sizeof begin);
        std::memcpy(&end, softmaxes.end + q, sizeof end);
        const auto where_seen = [&](int64_t key, F x, F otherwise) __attribute__((always_inline)) {
            if constexpr (kAll) return x;
            const int32_t number = static_cast<int32_t>(first + key);
            return reinterpret_cast<F>(((begin <= number) & (number < end)) ? reinterpret_cast<Integers>(x)
                                                                            : reinterpret_cast<Integers>(otherwise));
        };
        const F old = load(softmaxes.largest + q), old_total = load(softmaxes.totals + q);
        F largest = old;
        for (int64_t key = 0; key < kKeyTile; ++key) {
            const F x = where_seen(key, mul(load(score(key) + q), scale), lowest);
            store(score(key) + q, x);
            largest = max(largest, x);
        }
        // Where no key has been seen yet the largest is still -infinity.
        alignas(64) float now[W], before[W], bases[W], factors[W];
        store(now, largest);
        store(before, old);
        for (int i = 0; i < W; ++i) bases[i] = now[i] == -__builtin_inff() ? 0.0f : now[i];
        const F base = load(bases);
        store(factors, exp(sub(old, base)));
        for (int i = 0; i < W; ++i) factors[i] = before[i] == now[i] ? 1.0f : before[i] == -__builtin_inff() ? 0.0f : factors[i];
        F total = zero();
        for (int64_t key = 0; key < kKeyTile; ++key) {
            const F weight = where_seen(key, exp(sub(load(score(key) + q), base)), zero());
            store(score(key) + q, weight);
            total = add(total, weight);
        }
        store(softmaxes.largest + q, largest);
        store(softmaxes.totals + q, fma(old_total, load(factors), total));
        store(softmaxes.factors + q, load(factors));
    }
}

// Rounded to the nearest bfloat16, a half away from zero.
inline F near_bf16(F x) { return reinterpret_cast<F>((reinterpret_cast<Words>(x) + 0x8000u) & 0xffff0000u); }

// Sixteen dimensions of the values of two keys as a line of a tile of columns, or of two.
template <class Numbers, int kSides>
inline void fill_pair(const typename Numbers::Stored* first, const typename Numbers::Stored* second, char* high, char* low) {
    for (int i = 0; i < kTileSide; i += W) {
        const F x = Numbers::load(first + i), y = Numbers::load(second + i);
        store_upper_halves(high + i * 4, x, y);
        if constexpr (kSides == 2) store_upper_halves(low + i * 4, without_upper_half(x), without_upper_half(y));
    }
}

template <class Numbers, int kSides>
inline void attend_with_tiles(const Attention& attention, const float* q, int64_t q_stride, int64_t queries,
                              const SeenKeys* seen, const KeyRows& rows, float* y, int64_t y_stride, float* scratch) {
    using Stored = typename Numbers::Stored;
    const int64_t size = attention.head_size, groups = (queries + kTileSide - 1) / kTileSide;
    const AttentionScratch at{size / 32};

    TileWork scores, sums;
    scores.panel = {reinterpret_cast<char*>(scratch + at.keys_at()), at.steps, kSides, 0, size};
    scores.parts = 2;
    scores.part_bytes = at.steps * kTileBytes;
    scores.goes_on = false;
    scores.groups = groups;
    scores.sums = scratch + at.scores_at();
    sums.panel = {reinterpret_cast<char*>(scratch + at.weights_at()), kKeySteps, 2, 0, kKeyTile};
    sums.parts = kSides;
    sums.part_bytes = kKeySteps * kTileBytes;
    sums.goes_on = true;
    sums.groups = size / kTileSide;
    sums.sums = scratch + at.sums_at();
    char* values = reinterpret_cast<char*>(scratch + at.values_at());
    for (int64_t d = 0; d < sums.groups; ++d) sums.tiles[d] = values + d * kSides * sums.part_bytes;
    std::memset(sums.sums, 0, static_cast<size_t>(groups * sums.groups * kTileBytes));
    const auto* nothing = reinterpret_cast<const Stored*>(scratch + at.nothing_at());
    std::memset(scratch + at.nothing_at(), 0, static_cast<size_t>(size) * sizeof(float));

    Softmaxes softmaxes[kQueryGroups];
    for (int64_t group = 0; group < groups; ++group) {
        float* tiles = scratch + at.queries_at() + group * 2 * at.steps * kTileFloats;
        scores.tiles[group] = reinterpret_cast<const char*>(tiles);
        std::memset(tiles, 0, static_cast<size_t>(2 * at.steps * kTileBytes));
        for (int64_t i = 0; i < kTileSide; ++i) {
            const int64_t t = group * kTileSide + i;
            softmaxes[group].largest[i] = -__builtin_inff();
            softmaxes[group].totals[i] = 0;
            softmaxes[group].begin[i] = t < queries ? static_cast<int32_t>(seen[t].begin) : 0;
            softmaxes[group].end[i] = t < queries ? static_cast<int32_t>(seen[t].end) : 0;
            for (int64_t step = 0; t < queries && step < at.steps; ++step)
                take_apart(q + t * q_stride + step * 32, 2,
                           reinterpret_cast<char*>(tiles) + step * kTileBytes + i * kTileRowBytes, scores.part_bytes);
        }
        turn_lines(tiles, 2 * at.steps);
    }

    const TileUse use(64);
    // Tiles begin at multiples of their size, so that a query's sums do not depend on those beside it. Rows before the first
    // one that anybody sees may be gone, and there are none behind the last: nothing is in their place.
    const int64_t begin = seen[0].begin, end = seen[queries - 1].end;
    for (int64_t first = begin / kKeyTile * kKeyTile; first < end; first += kKeyTile) {
        const Stored* keys[kKeyTile];
        const Stored* values_of[kKeyTile];
        for (int64_t i = 0; i < kKeyTile;) {
            if (first + i < begin || first + i >= end) {
                keys[i] = values_of[i] = nothing;
                ++i;
                continue;
            }
            const Run run = run_at(rows, first + i, smaller(first + kKeyTile, end));
            for (int64_t k = 0; k < run.count; ++k, ++i) {
                const char* key = run.keys + k * rows.row_bytes;
                keys[i] = reinterpret_cast<const Stored*>(key);
                values_of[i] = reinterpret_cast<const Stored*>(key + rows.to_values);
            }
        }
        for (int64_t i = 0; i < kKeyTile; ++i) {
            char* line = scores.panel.at(i / kTileSide, 0, 0) + i % kTileSide * kTileRowBytes;
            for (int64_t step = 0; step < at.steps; ++step, line += kSides * kTileBytes)
                fill_line<Numbers, kSides>(keys[i] + step * 32, line, line + kTileBytes);
        }
        add_float_panel(scores, kSides, kKeyTiles);
        for (int64_t pair = 0; pair < kKeyTile / 2; ++pair)
            for (int64_t d = 0; d < sums.groups; ++d) {
                const int64_t i = pair / kTileSide * 32 + pair % kTileSide;  // in the order of the weights
                char* line = values + d * kSides * sums.part_bytes + pair * kTileRowBytes;
                fill_pair<Numbers, kSides>(values_of[i] + d * kTileSide, values_of[i + kTileSide] + d * kTileSide, line,
                                           line + sums.part_bytes);
            }
        for (int64_t group = 0; group < groups; ++group) {
            Softmaxes& these = softmaxes[group];
            const auto score = [&](int64_t key) { return scores.sums_at(key / kTileSide, group) + key % kTileSide * kTileSide; };
            const int64_t last = smaller(group * kTileSide + kTileSide, queries) - 1;
            const bool all = seen[group * kTileSide].end >= first + kKeyTile && seen[last].begin <= first &&
                             last == group * kTileSide + kTileSide - 1;
            if (all) weigh_group<true>(score, first, attention.score_scale, these);
            else weigh_group<false>(score, first, attention.score_scale, these);
            for (int64_t i = 0; i < kTileSide; ++i) {
                if (these.factors[i] == 1.0f) continue;
                for (int64_t d = 0; d < sums.groups; ++d)
                    for (int64_t v = 0; v < kTileSide; v += W) {
                        float* sum = sums.sums_at(group, d) + i * kTileSide + v;
                        store(sum, mul(load(sum), set1(these.factors[i])));
                    }
            }
            alignas(64) float weights[kTileSide * 32];
            for (int64_t step = 0; step < kKeySteps; ++step) {
                for (int64_t half = 0; half < 2; ++half)
                    turn_tile(scores.sums_at(2 * step + half, group), weights + half * kTileSide, 32);
                for (int64_t i = 0; i < kTileSide; ++i) {
                    char* line = sums.panel.at(group, step, 0) + i * kTileRowBytes;
                    for (int64_t k = 0; k < kTileSide; k += W) {
                        const F x = load(weights + i * 32 + k), z = load(weights + i * 32 + kTileSide + k);
                        store_upper_halves(line + k * 4, x, z);
                        store_upper_halves(line + kTileBytes + k * 4, near_bf16(without_upper_half(x)),
                                           near_bf16(without_upper_half(z)));
                    }
                }
            }
        }
        add_float_panel(sums, 2, groups);
    }
    for (int64_t t = 0; t < queries; ++t) {
        const F by = set1(attention.value_scale / softmaxes[t / kTileSide].totals[t % kTileSide]);
        for (int64_t d = 0; d < sums.groups; ++d)
            for (int64_t v = 0; v < kTileSide; v += W)
                store(y + t * y_stride + d * kTileSide + v,
                      mul(load(sums.sums_at(t / kTileSide, d) + t % kTileSide * kTileSide + v), by));
    }
}

inline void attend_block_with_tiles(const Attention& attention, const float* q, int64_t q_stride, int64_t queries,
                                    const SeenKeys* seen, const KeyRows& rows, float* y, int64_t y_stride, float* scratch) {
    if (!attends_with_tiles(attention)) attend_block(attention, q, q_stride, queries, seen, rows, y, y_stride, scratch);
    else if (attention.dtype == Dtype::f16)
        attend_with_tiles<F16, 2>(attention, q, q_stride, queries, seen, rows, y, y_stride, scratch);
    else attend_with_tiles<BF16, 1>(attention, q, q_stride, queries, seen, rows, y, y_stride, scratch);
}

}  // namespace nvtripy_portable::ISA

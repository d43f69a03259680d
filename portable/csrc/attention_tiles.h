// Attention of many queries: 64 keys at a time are a panel of weights like any other (float_panels.h), and so are their
// values, which lie the right way round already. Between the two products the softmax goes on as in attention.h.
#pragma once

#include "attention.h"
#include "float_panels.h"
#include "kernels.h"
#include "simd.h"

namespace nvtripy_portable::ISA {

// Makes weights of kPanelColumns products, of which those from `begin` to `end` count, and tells the softmax about them.
inline void weigh_tile(float* scores, int64_t begin, int64_t end, float score_scale, int64_t width, Partial& partial) {
    if (end <= begin) {
        std::memset(scores, 0, kPanelColumns * sizeof *scores);
        return;
    }
    for (int64_t j = 0; j < begin; ++j) scores[j] = -__builtin_inff();
    for (int64_t j = end; j < kPanelColumns; ++j) scores[j] = -__builtin_inff();
    F highest = set1(-__builtin_inff());
    for (int64_t j = 0; j < kPanelColumns; j += W) {
        const F score = mul(load(scores + j), set1(score_scale));
        store(scores + j, score);
        highest = max(highest, score);
    }
    alignas(64) float lanes[W];
    store(lanes, highest);
    float largest = partial.largest;
    for (int i = 0; i < W; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
    if (largest != partial.largest) {
        const float factor = partial.total == 0 ? 0.0f : exp_of(partial.largest - largest);
        partial.total *= factor;
        for (int64_t d = 0; d < width; d += W) store(partial.sums + d, mul(load(partial.sums + d), set1(factor)));
        partial.largest = largest;
    }
    for (int64_t j = 0; j < kPanelColumns; j += W) store(scores + j, exp(sub(load(scores + j), set1(largest))));
    for (int64_t j = 0; j < begin; ++j) scores[j] = 0;
    for (int64_t j = end; j < kPanelColumns; ++j) scores[j] = 0;
    F total = zero();
    for (int64_t j = 0; j < kPanelColumns; j += W) total = add(total, load(scores + j));
    partial.total += sum(total);
}

// The softmaxes of up to kQueryBlock queries, whose sums stay in scratch memory.
inline void attend_tiles(const Attention& attention, const float* q, int64_t q_stride, int64_t queries, const SeenKeys* seen,
                         const KeyRows& rows, Partial (&partials)[kQueryBlock], float* scratch) {
    const int64_t size = attention.head_size, wide = (size + kPanelColumns - 1) / kPanelColumns * kPanelColumns;
    const int64_t begin = seen[0].begin, end = seen[queries - 1].end;
    Matrix keys, value;
    keys.dtype = value.dtype = attention.dtype;
    keys.width = value.width = size;
    value.rows = 1;
    float* scores = scratch + kPanelScratch;
    float* sums = scores + kQueryBlock * kPanelColumns;
    float* panel = sums + kQueryBlock * wide;
    float* row = panel + kPanelColumns * wide;
    auto* gathered = reinterpret_cast<char*>(row + wide);
    for (int64_t t = 0; t < queries; ++t) partials[t] = {sums + t * wide, 0, -__builtin_inff()};
    std::memset(sums, 0, static_cast<size_t>(queries * wide) * sizeof *sums);
    std::memset(row, 0, static_cast<size_t>(wide) * sizeof *row);
    // Tiles begin at multiples of their size, so that a query's sums do not depend on those beside it. Rows before the first
    // one that anybody sees may be gone.
    for (int64_t j = begin / kPanelColumns * kPanelColumns; j < end; j += kPanelColumns) {
        const int64_t count = smaller(kPanelColumns, end - j), unseen = larger<int64_t>(begin - j, 0);
        // A tile of keys that lies in one page is used where it is.
        keys.rows = count;
        keys.data = gathered;
        const char* value_rows[kPanelColumns];
        std::memset(gathered, 0, static_cast<size_t>(unseen * rows.row_bytes));
        for (int64_t i = unseen; i < count;) {
            const Run run = run_at(rows, j + i, j + count);
            if (run.count == count) keys.data = run.keys;
            else std::memcpy(gathered + i * rows.row_bytes, run.keys, static_cast<size_t>(run.count * rows.row_bytes));
            for (int64_t k = 0; k < run.count; ++k, ++i) value_rows[i] = run.keys + rows.to_values + k * rows.row_bytes;
        }
        float_panels(keys, q, q_stride, queries, 0, count, scores, kPanelColumns, scratch);
        for (int64_t t = 0; t < queries; ++t)
            weigh_tile(scores + t * kPanelColumns, larger<int64_t>(seen[t].begin - j, 0), smaller(seen[t].end - j, count),
                       attention.score_scale, wide, partials[t]);
        for (int64_t i = 0; i < count; ++i) {
            if (i < unseen) {
                std::memset(row, 0, static_cast<size_t>(size) * sizeof *row);
            } else {
                value.data = value_rows[i];
                dequantize(value, 0, 0, size, row);
            }
            for (int64_t d = 0; d < wide; d += kTileColumns)
                std::memcpy(panel + d * kPanelColumns + i * kTileColumns, row + d, kTileColumns * sizeof *row);
        }
        for (int64_t t = 0; t < queries; t += kTileTokens)
            for (int64_t d = 0; d < wide; d += kTileColumns)
                float_tiles(smaller<int64_t>(kTileTokens, queries - t), scores + t * kPanelColumns, kPanelColumns,
                            panel + d * kPanelColumns, count, sums + t * wide + d, wide, true);
    }
}

inline void attend_block(const Attention& attention, const float* q, int64_t q_stride, int64_t queries,
                         const SeenKeys* seen, const KeyRows& rows, float* y, int64_t y_stride, float* scratch) {
    Partial partials[kQueryBlock];
    attend_tiles(attention, q, q_stride, queries, seen, rows, partials, scratch);
    for (int64_t t = 0; t < queries; ++t) divide(partials[t], attention.value_scale, attention.head_size, y + t * y_stride);
}

inline void attend_group(const Attention& attention, const float* q, int64_t q_stride, int64_t queries, SeenKeys seen,
                         const KeyRows& rows, Partial* results, float* scratch) {
    SeenKeys alike[kQueryBlock] = {};
    for (int64_t t = 0; t < queries; ++t) alike[t] = seen;
    Partial partials[kQueryBlock];
    attend_tiles(attention, q, q_stride, queries, alike, rows, partials, scratch);
    for (int64_t t = 0; t < queries; ++t) {
        results[t].total = partials[t].total;
        results[t].largest = partials[t].largest;
        std::memcpy(results[t].sums, partials[t].sums, static_cast<size_t>(attention.head_size) * sizeof(float));
    }
}

}  // namespace nvtripy_portable::ISA

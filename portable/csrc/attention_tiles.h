// Attention of many queries: 64 keys at a time are a panel of weights like any other (float_panels.h), and so are their
// values, which lie the right way round already. Between the two products the softmax goes on as in attention.h.
#pragma once

#include "attention.h"
#include "float_panels.h"
#include "kernels.h"
#include "simd.h"

namespace nvtripy_portable::ISA {

// Makes weights of kPanelColumns products, of which the first `seen` count, and tells the softmax about them.
inline void weigh_tile(float* scores, int64_t seen, float score_scale, int64_t width, Partial& partial) {
    if (seen <= 0) {
        std::memset(scores, 0, kPanelColumns * sizeof *scores);
        return;
    }
    for (int64_t j = seen; j < kPanelColumns; ++j) scores[j] = -__builtin_inff();
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
    for (int64_t j = seen; j < kPanelColumns; ++j) scores[j] = 0;
    F total = zero();
    for (int64_t j = 0; j < kPanelColumns; j += W) total = add(total, load(scores + j));
    partial.total += sum(total);
}

inline void attend_block(const Attention& attention, const float* q, int64_t q_stride, int64_t queries,
                         const int64_t* seen, const void* keys, const void* values, float* y, int64_t y_stride,
                         float* scratch) {
    const int64_t size = attention.head_size, wide = (size + kPanelColumns - 1) / kPanelColumns * kPanelColumns;
    const int64_t end = seen[queries - 1];
    Matrix key_rows, value_rows;
    key_rows.dtype = value_rows.dtype = attention.dtype;
    key_rows.width = value_rows.width = size;
    key_rows.rows = value_rows.rows = end;
    key_rows.data = keys;
    value_rows.data = values;
    float* scores = scratch + kPanelScratch;
    float* sums = scores + kQueryBlock * kPanelColumns;
    float* panel = sums + kQueryBlock * wide;
    float* row = panel + kPanelColumns * wide;
    Partial partials[kQueryBlock];
    for (int64_t t = 0; t < queries; ++t) partials[t] = {sums + t * wide, 0, -__builtin_inff()};
    std::memset(sums, 0, static_cast<size_t>(queries * wide) * sizeof *sums);
    std::memset(row, 0, static_cast<size_t>(wide) * sizeof *row);
    for (int64_t j = 0; j < end; j += kPanelColumns) {
        const int64_t count = smaller(kPanelColumns, end - j);
        float_panels(key_rows, q, q_stride, queries, j, j + count, scores, kPanelColumns, scratch);
        for (int64_t t = 0; t < queries; ++t)
            weigh_tile(scores + t * kPanelColumns, smaller(seen[t] - j, count), attention.score_scale, wide, partials[t]);
        for (int64_t i = 0; i < count; ++i) {
            dequantize(value_rows, j + i, 0, size, row);
            for (int64_t d = 0; d < wide; d += kTileColumns)
                std::memcpy(panel + d * kPanelColumns + i * kTileColumns, row + d, kTileColumns * sizeof *row);
        }
        for (int64_t t = 0; t < queries; t += kTileTokens)
            for (int64_t d = 0; d < wide; d += kTileColumns)
                float_tiles(smaller<int64_t>(kTileTokens, queries - t), scores + t * kPanelColumns, kPanelColumns,
                            panel + d * kPanelColumns, count, sums + t * wide + d, wide, true);
    }
    for (int64_t t = 0; t < queries; ++t) divide(partials[t], attention.value_scale, size, y + t * y_stride);
}

}  // namespace nvtripy_portable::ISA

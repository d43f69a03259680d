// Attention over stored keys and values, as an online softmax (Milakov and Gimelshein 2018): keys come in chunks, and
// what was summed so far is scaled down whenever a larger score appears.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace nvtripy_portable::ISA {

// scores[t, j] = q[t] . key j, of kKeys keys.
template <class Numbers, int kQueries, int kKeys>
inline void score_tile(const float* const* q, const typename Numbers::Stored* keys, int64_t row_stride,
                       int64_t head_size, float score_scale, float* scores) {
    F sums[kQueries][kKeys];
    for (int t = 0; t < kQueries; ++t)
        for (int j = 0; j < kKeys; ++j) sums[t][j] = zero();
    int64_t d = 0;
    for (; d + W <= head_size; d += W) {
        F queries[kQueries];
        for (int t = 0; t < kQueries; ++t) queries[t] = load(q[t] + d);
        for (int j = 0; j < kKeys; ++j) {
            const F key = Numbers::load(keys + j * row_stride + d);
            for (int t = 0; t < kQueries; ++t) sums[t][j] = fma(queries[t], key, sums[t][j]);
        }
    }
    if (d < head_size)
        for (int t = 0; t < kQueries; ++t) {
            const F query = load_part<F32>(q[t] + d, head_size - d);
            for (int j = 0; j < kKeys; ++j)
                sums[t][j] = fma(query, load_part<Numbers>(keys + j * row_stride + d, head_size - d), sums[t][j]);
        }
    for (int t = 0; t < kQueries; ++t)
        for (int j = 0; j < kKeys; ++j) scores[t * kKeyChunk + j] = sum(sums[t][j]) * score_scale;
}

template <class Stored>
inline void prefetch_rows(const Stored* from, int64_t count) {
    const auto* bytes = reinterpret_cast<const char*>(from);
    for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(Stored)); i += 64) prefetch(bytes + i);
}

// sums[t, d] += weights[t, j] * value j, over `count` values and kVectors * W of the head's dimensions. Meanwhile the next
// keys come.
template <class Numbers, int kQueries, int kVectors>
inline void value_tile(const float* weights, const typename Numbers::Stored* values, int64_t row_stride, int64_t count,
                       int64_t dimensions, int64_t d, NextKeys next, Partial* partials) {
    const auto* keys = static_cast<const typename Numbers::Stored*>(next.rows);
    const bool whole = dimensions >= kVectors * W;
    F sums[kQueries][kVectors];
    for (int t = 0; t < kQueries; ++t)
        for (int v = 0; v < kVectors; ++v)
            sums[t][v] = whole ? load(partials[t].sums + d + v * W) : load_part<F32>(partials[t].sums + d, dimensions);
    for (int64_t j = 0; j < count; ++j) {
        const auto* row = values + j * row_stride + d;
        if (j < next.count) prefetch_rows(keys + j * row_stride, row_stride);
        for (int v = 0; v < kVectors; ++v) {
            const F value = whole ? Numbers::load(row + v * W) : load_part<Numbers>(row, dimensions);
            for (int t = 0; t < kQueries; ++t)
                sums[t][v] = fma(set1(weights[t * kKeyChunk + j]), value, sums[t][v]);
        }
    }
    for (int t = 0; t < kQueries; ++t)
        for (int v = 0; v < kVectors; ++v) {
            if (whole) store(partials[t].sums + d + v * W, sums[t][v]);
            else store_part(partials[t].sums + d, sums[t][v], dimensions);
        }
}

inline float exp_of(float x) {
    alignas(64) float all[W];
    store(all, exp(set1(x)));
    return all[0];
}

// Makes weights of `count` scores, of which the first `seen` count, and tells the partial softmax about them.
inline void weigh(float* scores, int64_t seen, int64_t count, int64_t head_size, Partial& partial) {
    float largest = partial.largest;
    for (int64_t j = 0; j < seen; ++j) largest = scores[j] > largest ? scores[j] : largest;
    if (seen > 0) {
        const float factor = partial.total == 0 ? 0.0f : exp_of(partial.largest - largest);
        if (factor != 1.0f) {
            partial.total *= factor;
            for (int64_t d = 0; d < head_size; ++d) partial.sums[d] *= factor;
        }
        partial.largest = largest;
        F total = zero();
        const F by = set1(largest);
        int64_t j = 0;
        for (; j + W <= seen; j += W) {
            const F weight = exp(sub(load(scores + j), by));
            store(scores + j, weight);
            total = add(total, weight);
        }
        float rest = 0;
        if (j < seen) {
            alignas(64) float last[W];
            store(last, exp(sub(load_part<F32>(scores + j, seen - j), by)));
            for (int64_t i = 0; j + i < seen; ++i) {
                scores[j + i] = last[i];
                rest += last[i];
            }
        }
        partial.total += sum(total) + rest;
    }
    for (int64_t j = larger<int64_t>(seen, 0); j < count; ++j) scores[j] = 0;
}

template <class Numbers, int kQueries>
inline void attend_to(const Attention& attention, const float* const* q, const int64_t* seen, const void* all_keys,
                      const void* all_values, int64_t row_stride, int64_t begin, int64_t end, NextKeys next,
                      Partial* partials, float* scores) {
    using Stored = typename Numbers::Stored;
    const auto* keys = static_cast<const Stored*>(all_keys) + begin * row_stride;
    const auto* values = static_cast<const Stored*>(all_values) + begin * row_stride;
    const int64_t count = end - begin;
    constexpr int kKeys = kQueries > 2 && W < 16 ? 2 : 4;
    // A head's rows lie in two short runs of memory, too short for the CPU to notice: they are asked for here, values while
    // keys are scored, and the next call's keys while values are summed. The first call's own come some rows before their
    // scores.
    constexpr int kRowsAhead = 16;
    prefetch_rows(keys, smaller<int64_t>(kRowsAhead, count) * row_stride);
    int64_t j = 0;
    for (; j + kKeys <= count; j += kKeys) {
        prefetch_rows(keys + smaller(j + kRowsAhead, count - kKeys) * row_stride, kKeys * row_stride);
        prefetch_rows(values + j * row_stride, kKeys * row_stride);
        score_tile<Numbers, kQueries, kKeys>(q, keys + j * row_stride, row_stride, attention.head_size,
                                             attention.score_scale, scores + j);
    }
    for (; j < count; ++j)
        score_tile<Numbers, kQueries, 1>(q, keys + j * row_stride, row_stride, attention.head_size,
                                         attention.score_scale, scores + j);
    for (int t = 0; t < kQueries; ++t)
        weigh(scores + t * kKeyChunk, smaller(seen[t] - begin, count), count, attention.head_size, partials[t]);
    constexpr int kVectors = kQueries > 2 && W < 16 ? 2 : 4;
    int64_t d = 0;
    for (; d + kVectors * W <= attention.head_size; d += kVectors * W)
        value_tile<Numbers, kQueries, kVectors>(scores, values, row_stride, count, kVectors * W, d,
                                                d == 0 ? next : NextKeys{}, partials);
    for (; d < attention.head_size; d += W)
        value_tile<Numbers, kQueries, 1>(scores, values, row_stride, count, smaller<int64_t>(W, attention.head_size - d),
                                         d, d == 0 ? next : NextKeys{}, partials);
}

template <class Numbers>
inline void attend_as(const Attention& attention, const float* const* q, int64_t queries, const int64_t* seen,
                      const void* keys, const void* values, int64_t row_stride, int64_t begin, int64_t end,
                      NextKeys next, Partial* partials, float* scores) {
    switch (queries) {
        case 1: attend_to<Numbers, 1>(attention, q, seen, keys, values, row_stride, begin, end, next, partials, scores); break;
        case 2: attend_to<Numbers, 2>(attention, q, seen, keys, values, row_stride, begin, end, next, partials, scores); break;
        case 3: attend_to<Numbers, 3>(attention, q, seen, keys, values, row_stride, begin, end, next, partials, scores); break;
        default: attend_to<Numbers, 4>(attention, q, seen, keys, values, row_stride, begin, end, next, partials, scores); break;
    }
}

inline void attend(const Attention& attention, const float* const* q, int64_t queries, const int64_t* seen,
                   const void* keys, const void* values, int64_t row_stride, int64_t begin, int64_t end,
                   NextKeys next, Partial* partials, float* scores) {
    for (; begin < end; begin += kKeyChunk) {
        const int64_t to = smaller(begin + kKeyChunk, end);
        const NextKeys then = to < end ? NextKeys{} : next;
        switch (attention.dtype) {
            case Dtype::f32: attend_as<F32>(attention, q, queries, seen, keys, values, row_stride, begin, to, then, partials, scores); break;
            case Dtype::f16: attend_as<F16>(attention, q, queries, seen, keys, values, row_stride, begin, to, then, partials, scores); break;
            case Dtype::bf16: attend_as<BF16>(attention, q, queries, seen, keys, values, row_stride, begin, to, then, partials, scores); break;
            default: attend_as<I8>(attention, q, queries, seen, keys, values, row_stride, begin, to, then, partials, scores); break;
        }
    }
}

inline void merge(Partial& first, const Partial& second, int64_t head_size) {
    if (second.total == 0) return;
    const float largest = first.largest < second.largest ? second.largest : first.largest;
    const float by_first = first.total == 0 ? 0.0f : exp_of(first.largest - largest);
    const float by_second = exp_of(second.largest - largest);
    for (int64_t d = 0; d < head_size; ++d) first.sums[d] = first.sums[d] * by_first + second.sums[d] * by_second;
    first.total = first.total * by_first + second.total * by_second;
    first.largest = largest;
}

inline void divide(const Partial& partial, float value_scale, int64_t head_size, float* y) {
    for (int64_t d = 0; d < head_size; ++d) y[d] = partial.sums[d] / partial.total * value_scale;
}

}  // namespace nvtripy_portable::ISA

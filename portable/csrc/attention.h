// Attention over stored keys and values, as an online softmax (Milakov and Gimelshein 2018): keys come in chunks, and
// what was summed so far is scaled down whenever a larger score appears.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace nvtripy_portable::ISA {

// Keys that lie one behind the other, the first of them number `begin`.
struct Run {
    const char* keys;
    int64_t count;
};

inline Run run_at(const KeyRows& rows, int64_t begin, int64_t end) {
    const int64_t page = begin / rows.page_tokens, slot = begin - page * rows.page_tokens;
    return {rows.keys + rows.pages[page] * rows.page_bytes + slot * rows.row_bytes,
            smaller(rows.page_tokens - slot, end - begin)};
}

// scores[j] = q . key j, of kKeys keys.
template <class Numbers, int kKeys>
inline void score_tile(const float* q, const typename Numbers::Stored* keys, int64_t row_stride, int64_t head_size,
                       float score_scale, float* scores) {
    F sums[kKeys];
    for (int j = 0; j < kKeys; ++j) sums[j] = zero();
    int64_t d = 0;
    for (; d + W <= head_size; d += W) {
        const F query = load(q + d);
        for (int j = 0; j < kKeys; ++j) sums[j] = fma(query, Numbers::load(keys + j * row_stride + d), sums[j]);
    }
    if (d < head_size) {
        const F query = load_part<F32>(q + d, head_size - d);
        for (int j = 0; j < kKeys; ++j)
            sums[j] = fma(query, load_part<Numbers>(keys + j * row_stride + d, head_size - d), sums[j]);
    }
    for (int j = 0; j < kKeys; ++j) scores[j] = sum(sums[j]) * score_scale;
}

inline void prefetch_bytes(const char* from, int64_t count) {
    for (int64_t i = 0; i < count; i += 64) prefetch(from + i);
}

// sums[d] += weights[j] * value j, over the keys begin <= j < end and kVectors * W of the head's dimensions. Meanwhile the
// next keys come.
template <class Numbers, int kVectors>
inline void value_tile(const float* weights, const KeyRows& rows, int64_t begin, int64_t end, int64_t dimensions,
                       int64_t d, NextKeys next, float* to) {
    using Stored = typename Numbers::Stored;
    const bool whole = dimensions >= kVectors * W;
    F sums[kVectors];
    for (int v = 0; v < kVectors; ++v) sums[v] = whole ? load(to + d + v * W) : load_part<F32>(to + d, dimensions);
    for (int64_t j = begin; j < end;) {
        const Run run = run_at(rows, j, end);
        const char* row = run.keys + rows.to_values + d * static_cast<int64_t>(sizeof(Stored));
        for (int64_t i = 0; i < run.count; ++i, row += rows.row_bytes) {
            const int64_t number = j + i - begin;
            if (number < next.count) prefetch_bytes(next.keys + number * rows.row_bytes, rows.row_bytes);
            const auto* value = reinterpret_cast<const Stored*>(row);
            const F weight = set1(weights[number]);
            for (int v = 0; v < kVectors; ++v)
                sums[v] = fma(weight, whole ? Numbers::load(value + v * W) : load_part<Numbers>(value, dimensions), sums[v]);
        }
        j += run.count;
    }
    for (int v = 0; v < kVectors; ++v) {
        if (whole) store(to + d + v * W, sums[v]);
        else store_part(to + d, sums[v], dimensions);
    }
}

inline float exp_of(float x) {
    alignas(64) float all[W];
    store(all, exp(set1(x)));
    return all[0];
}

// Makes weights of `count` scores, and tells the partial softmax about them.
inline void weigh(float* scores, int64_t count, int64_t head_size, Partial& partial) {
    float largest = partial.largest;
    for (int64_t j = 0; j < count; ++j) largest = scores[j] > largest ? scores[j] : largest;
    const float factor = partial.total == 0 ? 0.0f : exp_of(partial.largest - largest);
    if (factor != 1.0f) {
        partial.total *= factor;
        for (int64_t d = 0; d < head_size; ++d) partial.sums[d] *= factor;
    }
    partial.largest = largest;
    F total = zero();
    const F by = set1(largest);
    int64_t j = 0;
    for (; j + W <= count; j += W) {
        const F weight = exp(sub(load(scores + j), by));
        store(scores + j, weight);
        total = add(total, weight);
    }
    float rest = 0;
    if (j < count) {
        alignas(64) float last[W];
        store(last, exp(sub(load_part<F32>(scores + j, count - j), by)));
        for (int64_t i = 0; j + i < count; ++i) {
            scores[j + i] = last[i];
            rest += last[i];
        }
    }
    partial.total += sum(total) + rest;
}

// Up to kKeyChunk keys. Neither scores nor sums know where pages end.
template <class Numbers>
inline void attend_to(const Attention& attention, const float* q, const KeyRows& rows, int64_t begin, int64_t end,
                      NextKeys next, Partial& partial, float* scores) {
    using Stored = typename Numbers::Stored;
    const int64_t row_stride = rows.row_bytes / static_cast<int64_t>(sizeof(Stored));
    constexpr int kKeys = 4;
    // A head's rows lie in short runs of memory, too short for the CPU to notice: they are asked for here, values while keys
    // are scored, and the next call's keys while values are summed. The first call's own come some rows before their scores:
    // from 4 to 64 rows are within 5 % of each other on a Zen 3 (124M, context 1000, int8 and int4).
    constexpr int kRowsAhead = 16;
    for (int64_t first = begin; first < end;) {
        const Run run = run_at(rows, first, end);
        const auto* keys = reinterpret_cast<const Stored*>(run.keys);
        float* to = scores + (first - begin);
        prefetch_bytes(run.keys, smaller<int64_t>(kRowsAhead, run.count) * rows.row_bytes);
        int64_t j = 0;
        for (; j + kKeys <= run.count; j += kKeys) {
            prefetch_bytes(run.keys + smaller(j + kRowsAhead, run.count - kKeys) * rows.row_bytes, kKeys * rows.row_bytes);
            prefetch_bytes(run.keys + rows.to_values + j * rows.row_bytes, kKeys * rows.row_bytes);
            score_tile<Numbers, kKeys>(q, keys + j * row_stride, row_stride, attention.head_size, attention.score_scale,
                                       to + j);
        }
        for (; j < run.count; ++j)
            score_tile<Numbers, 1>(q, keys + j * row_stride, row_stride, attention.head_size, attention.score_scale, to + j);
        first += run.count;
    }
    weigh(scores, end - begin, attention.head_size, partial);
    constexpr int kVectors = 4;
    int64_t d = 0;
    for (; d + kVectors * W <= attention.head_size; d += kVectors * W)
        value_tile<Numbers, kVectors>(scores, rows, begin, end, kVectors * W, d, d == 0 ? next : NextKeys{}, partial.sums);
    for (; d < attention.head_size; d += W)
        value_tile<Numbers, 1>(scores, rows, begin, end, smaller<int64_t>(W, attention.head_size - d), d,
                               d == 0 ? next : NextKeys{}, partial.sums);
}

inline void attend(const Attention& attention, const float* q, const KeyRows& rows, int64_t begin, int64_t end,
                   NextKeys next, Partial& partial, float* scores) {
    for (; begin < end; begin += kKeyChunk) {
        const int64_t to = smaller(begin + kKeyChunk, end);
        const NextKeys then = to < end ? NextKeys{} : next;
        switch (attention.dtype) {
            case Dtype::f32: attend_to<F32>(attention, q, rows, begin, to, then, partial, scores); break;
            case Dtype::f16: attend_to<F16>(attention, q, rows, begin, to, then, partial, scores); break;
            case Dtype::bf16: attend_to<BF16>(attention, q, rows, begin, to, then, partial, scores); break;
            default: attend_to<I8>(attention, q, rows, begin, to, then, partial, scores); break;
        }
    }
}

inline void turn(const float* x, const float* cosines, int64_t half, int64_t size, float* y) {
    const float* sines = cosines + half;
    int64_t i = 0;
    for (; i + W <= half; i += W) {
        const F first = load(x + i), second = load(x + half + i), cos = load(cosines + i), sin = load(sines + i);
        store(y + i, sub(mul(first, cos), mul(second, sin)));
        store(y + half + i, add(mul(second, cos), mul(first, sin)));
    }
    for (; i < half; ++i) {
        y[i] = x[i] * cosines[i] - x[half + i] * sines[i];
        y[half + i] = x[half + i] * cosines[i] + x[i] * sines[i];
    }
    for (i = 2 * half; i < size; ++i) y[i] = x[i];
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

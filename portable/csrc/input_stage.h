// What happens to a row before it meets weights: a gate, normalization, a scale for each input, rounding, and for integer
// products 16-bit numbers.
#pragma once

#include "activations.h"
#include "integer_products.h"
#include "kernels.h"
#include "numbers.h"
#include "simd.h"

namespace nvtripy_portable::ISA {

inline void layer_norm(const float* x, const float* scale, const float* bias, float epsilon, int64_t width, float* y) {
    const int64_t whole = width / W * W;
    const float count = static_cast<float>(width);
    F sums = zero();
    for (int64_t i = 0; i < whole; i += W) sums = add(sums, load(x + i));
    if (whole < width) sums = add(sums, load_part<F32>(x + whole, width - whole));
    const float mean = sum(sums) / count;
    F squares = zero();
    for (int64_t i = 0; i < whole; i += W) {
        const F centered = sub(load(x + i), set1(mean));
        squares = fma(centered, centered, squares);
    }
    float rest = 0;
    for (int64_t i = whole; i < width; ++i) rest += (x[i] - mean) * (x[i] - mean);
    const float variance = (sum(squares) + rest) / count;
    const float factor = 1.0f / __builtin_sqrtf(variance + epsilon);
    for (int64_t i = 0; i < whole; i += W)
        store(y + i, fma(mul(sub(load(x + i), set1(mean)), set1(factor)), load(scale + i), load(bias + i)));
    for (int64_t i = whole; i < width; ++i) y[i] = (x[i] - mean) * factor * scale[i] + bias[i];
}

inline void rms_norm(const float* x, const float* scale, float epsilon, int64_t width, float* y) {
    const int64_t whole = width / W * W;
    F squares = zero();
    for (int64_t i = 0; i < whole; i += W) squares = fma(load(x + i), load(x + i), squares);
    float rest = 0;
    for (int64_t i = whole; i < width; ++i) rest += x[i] * x[i];
    const float factor = 1.0f / __builtin_sqrtf((sum(squares) + rest) / static_cast<float>(width) + epsilon);
    for (int64_t i = 0; i < whole; i += W) store(y + i, mul(mul(load(x + i), set1(factor)), load(scale + i)));
    for (int64_t i = whole; i < width; ++i) y[i] = x[i] * factor * scale[i];
}

inline void norm(const float* x, const float* scale, const float* bias, float epsilon, int64_t width, float* y) {
    if (bias) layer_norm(x, scale, bias, epsilon, width, y);
    else rms_norm(x, scale, epsilon, width, y);
}

inline int64_t padded_width(int64_t width) { return (width + kPadding - 1) / kPadding * kPadding; }

// The largest magnitude; NaN if there is one. As integers, the bits of magnitudes compare as the numbers do.
inline float largest_magnitude(const float* x, int64_t count) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) largest = larger(largest, float_bits(x[i]) & 0x7fffffffu);
    return to_float_bits(largest);
}

// Gate, normalization and pre-scale into y, with padding.
inline void normalize(const InputStage& stage, const float* x, float* y) {
    const int64_t width = stage.width;
    if (stage.gate != Activation::none) {
        apply_gate(x, stage.gate, width, y);
        x = y;
    }
    if (stage.norm_scale) {
        norm(x, stage.norm_scale, stage.norm_bias, stage.epsilon, width, y);
        x = y;
    }
    if (stage.pre_scale) {
        for (int64_t i = 0; i < width; ++i) y[i] = x[i] * stage.pre_scale[i];
    } else if (x != y) {
        std::memcpy(y, x, static_cast<size_t>(width) * sizeof *y);
    }
    const int64_t padded = padded_width(width);
    for (int64_t i = width; i < padded; ++i) y[i] = 0;
}

// Rounds a row to numbers of which `scale`, returned, gives the inputs back.
inline float round_row(const InputStage& stage, float* y) {
    float scale = stage.input_scale;
    if (stage.per_token) {
        const float largest = largest_magnitude(y, stage.width) / 127.0f;
        scale = largest < 1e-6f ? 1e-6f : largest;
    }
    if (stage.rounding == Rounding::i8) {
        for (int64_t i = 0; i < stage.width; ++i) y[i] = round_i8(y[i] / scale);
    } else {
        for (int64_t i = 0; i < stage.width; ++i) y[i] = round_f8(y[i] / scale);
    }
    return scale;
}

inline void prepare(const InputStage& stage, const float* x, float* y) {
    normalize(stage, x, y);
    if (stage.rounding == Rounding::none) return;
    const float scale = round_row(stage, y);
    for (int64_t i = 0; i < stage.width; ++i) y[i] *= scale;
}

// kInputBlock numbers as integers up to `limit` times a scale, which is returned; those of 8 bits are what they are.
inline float round_block(const float* x, Rounding rounding, float limit, int16_t* values) {
    float scale = 1, factor = 1;
    if (rounding != Rounding::i8) {
        const float largest = largest_magnitude(x, kInputBlock);
        scale = largest / limit;
        factor = largest < 1e-30f ? 0.0f : limit / largest;
    }
    for (int i = 0; i < kInputBlock; ++i) {
        float value = x[i] * factor;
        value = value == value ? value : 0.0f;  // NaN and infinity are in the scale already
        values[i] = static_cast<int16_t>((value + 12582912.0f) - 12582912.0f);
    }
    return scale;
}

inline void prepare_integers(const InputStage& stage, Dtype weight, const float* x, float* scratch, IntegerRow row) {
    normalize(stage, x, scratch);
    const float row_scale = stage.rounding == Rounding::none ? 1.0f : round_row(stage, scratch);
    const int64_t padded = padded_width(stage.width);
    const float limit = weight == Dtype::i4 ? kLargestForInt4 : kLargestForInt8;
    const float unit = weight == Dtype::i4 ? kUnitOfInt4 : 1.0f;
    for (int64_t start = 0; start < padded; start += kInputBlock) {
        int16_t values[kInputBlock];
        row.scales[start / kInputBlock] = row_scale * round_block(scratch + start, stage.rounding, limit, values) * unit;
        int16_t* to = row.values + start;
        if (weight == Dtype::i4) arrange_for_int4(values, to, row.begin + start / 8);
        else arrange_for_int8(values, to);
    }
}

}  // namespace nvtripy_portable::ISA

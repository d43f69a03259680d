// Single rows: out of tables, into caches; and what follows a product.
#pragma once

#include "activations.h"
#include "dequantize.h"
#include "kernels.h"
#include "numbers.h"
#include "products.h"
#include "simd.h"

namespace nvtripy_portable::ISA {

inline void load_row(const Matrix& matrix, int64_t row, float* y) {
    dequantize(matrix, row, 0, matrix.width, y);
}

inline float rounded(float value, Rounding rounding, float scale) {
    if (rounding == Rounding::none) return value;
    return rounding == Rounding::i8 ? round_i8(value / scale) : round_f8(value / scale);
}

inline void store_row(const float* x, int64_t count, Rounding rounding, float scale, Dtype dtype, void* y) {
    int64_t i = 0;
#if ISA_NUMBER(ISA) > 1
    if (dtype == Dtype::f16 && rounding == Rounding::none)
        for (; i + W <= count; i += W) store_f16(static_cast<uint16_t*>(y) + i, load(x + i));
#endif
    for (; i < count; ++i) {
        const float value = rounded(x[i], rounding, scale);
        switch (dtype) {
            case Dtype::f32: static_cast<float*>(y)[i] = value; break;
            case Dtype::f16: static_cast<uint16_t*>(y)[i] = to_f16(value); break;
            case Dtype::bf16: static_cast<uint16_t*>(y)[i] = to_bf16(value); break;
            default: static_cast<int8_t*>(y)[i] = static_cast<int8_t>(round_i8(value)); break;
        }
    }
}

// A number as a byte holds it: of int4 the low half.
inline uint8_t code_of(float value, Dtype dtype) {
    if (dtype == Dtype::f8) return f8_code(value);
    if (dtype == Dtype::i8) return static_cast<uint8_t>(static_cast<int>(round_i8(value)));
    value = value > 7.0f ? 7.0f : value;  // NaN stays, and becomes 0 next
    value = value < -8.0f ? -8.0f : value;
    return static_cast<uint8_t>(static_cast<int>(round_i8(value)) & 15);
}

template <class Numbers>
inline void quantize_as(const typename Numbers::Stored* x, int64_t count, const float* scale, bool per_number, Dtype to,
                        uint8_t* y) {
    constexpr int64_t kRun = 64;
    alignas(64) float values[kRun];
    for (int64_t start = 0; start < count; start += kRun) {
        const int64_t here = smaller(kRun, count - start);
        int64_t i = 0;
        for (; i + W <= here; i += W)
            store(values + i, div(Numbers::load(x + start + i), per_number ? load(scale + start + i) : set1(*scale)));
        if (i < here) {
            const F by = per_number ? load_part<F32>(scale + start + i, here - i) : set1(*scale);
            store_part(values + i, div(load_part<Numbers>(x + start + i, here - i), by), here - i);
        }
        for (i = 0; i < here; ++i) y[start + i] = code_of(values[i], to);
    }
}

inline void quantize(const void* x, Dtype from, int64_t count, const float* scale, bool per_number, Dtype to, uint8_t* y) {
    switch (from) {
        case Dtype::f32: quantize_as<F32>(static_cast<const float*>(x), count, scale, per_number, to, y); break;
        case Dtype::f16: quantize_as<F16>(static_cast<const uint16_t*>(x), count, scale, per_number, to, y); break;
        default: quantize_as<BF16>(static_cast<const uint16_t*>(x), count, scale, per_number, to, y); break;
    }
}

inline void finish(float* y, int64_t count, const float* bias, Activation activation, const float* residual) {
    int64_t i = 0;
    for (; i + W <= count; i += W) {
        F value = load(y + i);
        if (bias) value = add(value, load(bias + i));
        value = activate(value, activation);
        if (residual) value = add(value, load(residual + i));
        store(y + i, value);
    }
    const int64_t rest = count - i;
    if (rest > 0) {
        F value = load_part<F32>(y + i, rest);
        if (bias) value = add(value, load_part<F32>(bias + i, rest));
        value = activate(value, activation);
        if (residual) value = add(value, load_part<F32>(residual + i, rest));
        store_part(y + i, value, rest);
    }
}

// NaN where a block has one.
inline void block_maxima(const float* x, int64_t count, int64_t block, float* maxima) {
    for (int64_t start = 0; start < count; start += block) {
        const int64_t end = smaller(start + block, count);
        F largest = set1(-__builtin_inff()), sums = zero();
        int64_t i = start;
        for (; i + W <= end; i += W) {
            const F values = load(x + i);
            largest = max(largest, values);
            sums = add(sums, values);
        }
        alignas(64) float lanes[W];
        store(lanes, largest);
        float result = -__builtin_inff(), total = sum(sums);
        for (int lane = 0; lane < W; ++lane) result = lanes[lane] > result ? lanes[lane] : result;
        for (; i < end; ++i) {
            result = x[i] > result ? x[i] : result;
            total += x[i];
        }
        // NaN is in no maximum, but in the sum; which infinities can spoil as well, or an overflow.
        if (!(total - total == 0))
            for (i = start; i < end; ++i) result = x[i] == x[i] ? result : x[i];
        maxima[start / block] = result;
    }
}

inline float read(const float* x, int64_t count) {
    F sums[4] = {zero(), zero(), zero(), zero()};
    for (int64_t i = 0; i + 4 * W <= count; i += 4 * W) {
        prefetch_once(x + i + bytes_ahead() / 4);
        for (int j = 0; j < 4; ++j) sums[j] = add(sums[j], load(x + i + j * W));
    }
    return sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

}  // namespace nvtripy_portable::ISA

// A linear operation's kernels by role: generated tokens meet rows of weights as they are stored, prompts meet panels of them.
#pragma once

#include "float_panels.h"
#include "input_stage.h"
#include "integer_products.h"
#include "kernels.h"
#include "products.h"
#include "simd.h"

// Without products of bytes NEON multiplies no more integers at a time than floats, so prompts stay float32.
#if ISA_NUMBER(ISA) == 4 && !ISA_BYTES
#define ISA_INTEGER_PROMPTS 0
#else
#define ISA_INTEGER_PROMPTS 1
#include "integer_panels.h"
#endif

namespace nvtripy_portable::ISA {

constexpr int64_t kPreparedTogether = 1;
constexpr int64_t kRowGroup = 12;

inline bool takes_integers(const Linear& linear, Role role) {
    return linear.integers && (ISA_INTEGER_PROMPTS || role == Role::generated);
}

inline bool is_plain(const InputStage& stage) {
    return stage.gate == Activation::none && !stage.norm_scale && !stage.pre_scale && stage.rounding == Rounding::none &&
           stage.width % kInputBlock == 0;
}

// Of an integer row: values, where their sums begin, and scales, which are made to end at a cache line.
inline int64_t integer_row_floats(int64_t width) {
    const int64_t padded = padded_width(width);
    return padded / 2 + padded / 8 + (padded / kInputBlock + 15) / 16 * 16;
}

inline IntegerRow integer_row(float* memory, int64_t width) {
    float* begin = memory + padded_width(width) / 2;
    return {reinterpret_cast<int16_t*>(memory), begin + padded_width(width) / 8, reinterpret_cast<int32_t*>(begin)};
}

// Of one prepared token; of inputs that are used as they are, their width.
inline int64_t prepared_stride(const Linear& linear, Role role) {
    const int64_t width = linear.stage.width;
    return takes_integers(linear, role) ? integer_row_floats(width) : padded_width(width);
}

inline int64_t prepared_floats(const Linear& linear, Role role, int64_t tokens) {
    return !takes_integers(linear, role) && is_plain(linear.stage) ? 0 : tokens * prepared_stride(linear, role);
}

inline void prepare_tokens(const Linear& linear, Role role, const float* x, int64_t, int64_t begin, int64_t end,
                           float* prepared, float* scratch) {
    const int64_t width = linear.stage.width, stride = prepared_stride(linear, role);
    for (int64_t t = begin; t < end; ++t) {
        const float* from = x + t * linear.stage.input_width();
        float* to = prepared + t * stride;
        if (!takes_integers(linear, role)) prepare(linear.stage, from, to);
        else if (role == Role::generated) prepare_integers(linear.stage, linear.weight.dtype, from, scratch, integer_row(to, width));
#if ISA_INTEGER_PROMPTS
        else prepare_panel_integers(linear.stage, linear.weight.dtype, from, scratch, integer_row(to, width));
#endif
    }
}

inline void multiply(const Linear& linear, Role role, const float* prepared, int64_t, int64_t first, int64_t count,
                     int64_t begin, int64_t end, float* y, int64_t y_stride, float* scratch) {
    const int64_t stride = prepared_stride(linear, role);
    const float* x = prepared + first * stride;
    if (takes_integers(linear, role)) {
        const IntegerRow row = integer_row(const_cast<float*>(x), linear.stage.width);
        if (role == Role::generated)
            integer_products(linear.weight, row, stride, count, begin, end, y, y_stride);
#if ISA_INTEGER_PROMPTS
        else
            integer_panels(linear.weight, row, stride, count, begin, end, y, y_stride, scratch);
#endif
    } else if (role == Role::generated) {
        products(linear.weight, x, stride, count, begin, end, y, y_stride, scratch);
    } else {
        float_panels(linear.weight, x, stride, count, begin, end, y, y_stride, scratch);
    }
}

}  // namespace nvtripy_portable::ISA

// What a kernel takes, and the table of kernels for one instruction set. Nothing here knows threads or Python: a kernel
// computes the part that it is told to, and the result does not depend on how the work was cut into parts.
//
// Activations are float32. Rows of inputs to `products` are padded with zeros to a multiple of 128.
#pragma once

#include <cstdint>

namespace nvtripy_portable {

enum class Dtype : int { f32, f16, bf16, i8, i4, f8 };
enum class Activation : int { none, gelu_tanh, gelu_erf, relu, silu };
enum class Rounding : int { none, i8, f8 };

constexpr int64_t kInputBlock = 128;  // inputs that share a scale where they are made integers

// How far ahead of their use weights are asked for. Rows lie one behind the other and are read in that order, so this
// reaches into the rows that come next. It takes a hundred to some hundred nanoseconds to come, in which a core uses up to
// 10 KB, and it waits in the first-level cache. Who calls asks for the first ones.
constexpr int64_t kBytesAhead = 16384;

// Rows of numbers as they are stored: (rows, width), int4 two a byte, the even one in the low half.
struct Matrix {
    const void* data = nullptr;
    Dtype dtype = Dtype::f32;
    int64_t rows = 0;
    int64_t width = 0;
    // Scales: one (block 0, scale_stride 0), one a row (block 0, scale_stride 1), or one for every `block` numbers of a
    // row (scale_stride of them a row). nullptr: all 1.
    const float* scales = nullptr;
    int64_t scale_stride = 0;
    int64_t block = 0;
    bool has_nan = false;  // among float8 numbers

    int64_t row_bytes() const {
        switch (dtype) {
            case Dtype::f32: return width * 4;
            case Dtype::f16:
            case Dtype::bf16: return width * 2;
            case Dtype::i4: return (width + 1) / 2;
            default: return width;
        }
    }
};

// What is done to a linear operation's input, row by row.
struct InputStage {
    int64_t width = 0;
    const float* norm_scale = nullptr;  // with it, layer normalization comes first
    const float* norm_bias = nullptr;
    float epsilon = 0;
    const float* pre_scale = nullptr;  // (width,)
    Rounding rounding = Rounding::none;
    bool per_token = false;  // int8 by each row's own largest magnitude; else by input_scale
    float input_scale = 1;
};

// One row of inputs as integers: numbers = values * scales[i / 128]. For int4 weights the values stand in the order and
// form in which the kernels' unpacked weights want them; `begin` is then where the sums of 128 products begin (int4_bytes.h).
struct IntegerRow {
    int16_t* values = nullptr;
    float* scales = nullptr;
    int32_t* begin = nullptr;  // 16 for every 128 values
};

struct Attention {
    Dtype dtype = Dtype::f32;  // of keys and values: f32, f16, bf16 or i8
    int64_t head_size = 0;
    float score_scale = 1;  // of a query's product with a stored key
    float value_scale = 1;  // of stored values
};

// Keys that the next call is going to meet, to be asked for while there is nothing else to wait for.
struct NextKeys {
    const void* rows = nullptr;
    int64_t count = 0;
};

// A softmax under way: weighted sum of values, its weights' sum, and the largest score so far.
struct Partial {
    float* sums;  // (head_size,), not yet divided by `total`
    float total;
    float largest;
};

struct Kernels {
    const char* name;

    // y = layer_norm(x), one row.
    void (*layer_norm)(const float* x, const float* scale, const float* bias, float epsilon, int64_t width, float* y);

    // One row through a linear operation's input stage; `y` has the padded width.
    void (*prepare)(const InputStage& stage, const float* x, float* y);
    // The same, made integers.
    void (*prepare_integers)(const InputStage& stage, Dtype weight, const float* x, float* scratch, IntegerRow row);

    // y[t, n - begin] = x[t] . row n, scaled, for the weight's rows begin <= n < end.
    void (*products)(const Matrix& weight, const float* x, int64_t x_stride, int64_t tokens, int64_t begin, int64_t end,
                     float* y, int64_t y_stride, float* panel);
    // The same from integer rows, up to 4 tokens; the weight is int8 or int4.
    void (*integer_products)(const Matrix& weight, const IntegerRow* x, int64_t tokens, int64_t begin, int64_t end,
                             float* y, int64_t y_stride);

    // What `products` computes, for more tokens: up to kPanelTokens tokens meet up to kPanelColumns rows of weights. The
    // scratch memory has kPanelScratch floats.
    void (*float_panels)(const Matrix& weight, const float* x, int64_t x_stride, int64_t tokens, int64_t begin,
                         int64_t end, float* y, int64_t y_stride, float* scratch);
    // The same from integer rows of `prepare_panel_integers`, x_stride floats apart; the weight is int8 or int4.
    void (*integer_panels)(const Matrix& weight, IntegerRow x, int64_t x_stride, int64_t tokens, int64_t begin,
                           int64_t end, float* y, int64_t y_stride, float* scratch);
    // As prepare_integers, in the order in which integer_panels reads.
    void (*prepare_panel_integers)(const InputStage& stage, Dtype weight, const float* x, float* scratch,
                                   IntegerRow row);

    // y = activation(y + bias) + residual; bias and residual may be nullptr.
    void (*finish)(float* y, int64_t count, const float* bias, Activation activation, const float* residual);

    // y = one stored row, scaled; `y` has the padded width.
    void (*load_row)(const Matrix& matrix, int64_t row, float* y);

    // y[i] = x[i] / scale rounded to the nearest, a half to the even, as one byte: int8, int4 (in the low half) or float8,
    // whatever does not fit saturated. x is f32, f16 or bf16; there is one scale, or one for each number.
    void (*quantize)(const void* x, Dtype from, int64_t count, const float* scale, bool per_number, Dtype to, uint8_t* y);

    // Rounds one head's new row for the cache and stores it there: round(x / scale), in the cache's type.
    void (*store_row)(const float* x, int64_t count, Rounding rounding, float scale, Dtype dtype, void* y);

    // Continues the softmax of `queries` <= 4 queries with the keys begin <= j < end, of which query t sees those below
    // seen[t]. Row strides are in elements.
    void (*attend)(const Attention& attention, const float* const* q, int64_t queries, const int64_t* seen,
                   const void* keys, const void* values, int64_t row_stride, int64_t begin, int64_t end,
                   NextKeys next, Partial* partials, float* scratch);
    // The whole softmax of up to kQueryBlock queries, q_stride apart, of which query t sees the first seen[t] keys, never
    // fewer than the one before; the scratch memory has attend_block_floats(head_size) floats.
    void (*attend_block)(const Attention& attention, const float* q, int64_t q_stride, int64_t queries,
                         const int64_t* seen, const void* keys, const void* values, float* y, int64_t y_stride,
                         float* scratch);
    // Continues one softmax with another's: first = first with second.
    void (*merge)(Partial& first, const Partial& second, int64_t head_size);
    // y = sums / total * value_scale.
    void (*divide)(const Partial& partial, float value_scale, int64_t head_size, float* y);

    // The largest of each block of `block` numbers; NaN counts as the smallest.
    void (*block_maxima)(const float* x, int64_t count, int64_t block, float* maxima);

    // Reads memory as fast as possible: the sum of `count` float32 numbers.
    float (*read)(const float* x, int64_t count);
};

// Sizes of the scratch memory that kernels ask for, in floats.
constexpr int64_t kPanelRows = 12;
constexpr int64_t kPanelWidth = 512;
constexpr int64_t kPanelFloats = kPanelRows * kPanelWidth;
constexpr int64_t kPanelColumns = 64;   // of a panel for many tokens: rows of weights, side by side
constexpr int64_t kPanelDepth = 128;    // numbers of each: one block of integer inputs
constexpr int64_t kPanelTokens = 256;
constexpr int64_t kPanelScratch = kPanelColumns * (kPanelDepth + kPanelTokens);
constexpr int64_t kKeyChunk = 256;  // keys that are attended to together
constexpr int64_t kQueryTile = 4;
constexpr int64_t kQueryBlock = 48;
constexpr int64_t attend_block_floats(int64_t head_size) {
    const int64_t wide = (head_size + kPanelColumns - 1) / kPanelColumns * kPanelColumns;
    return kPanelScratch + kQueryBlock * (kPanelColumns + wide) + (kPanelColumns + 1) * wide;
}
constexpr int64_t kAttendFloats = kQueryTile * (kKeyChunk + 64);

namespace portable { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }

}  // namespace nvtripy_portable

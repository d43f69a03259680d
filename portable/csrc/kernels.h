// What a kernel takes, and the table of kernels for one instruction set. Nothing here knows threads or Python: a kernel
// computes the part that it is told to, and the result does not depend on how the work was cut into parts.
//
// Activations are float32. Rows of inputs to `products` are padded with zeros to a multiple of 128.
#pragma once

#include <cstdint>

namespace nvtripy_portable {

enum class Dtype : int { f32, f16, bf16, i8, i4, f8 };
enum class Activation : int { none, gelu_tanh, gelu_erf, relu, relu2, silu };
enum class Rounding : int { none, i8, f8 };

// What a token is in its sequence. Each role has kernels of its own, which compute a row's sum in one order however many
// rows there are: what a token comes to does not depend on what is computed beside it.
enum class Role : int { generated, prompt };

constexpr int64_t kInputBlock = 128;  // inputs that share a scale where they are made integers

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
    Activation gate = Activation::none;  // with it, rows have twice the width: gate(first half) * second half comes first
    const float* norm_scale = nullptr;   // with it, normalization comes first: RMSNorm where there is no bias
    const float* norm_bias = nullptr;
    float epsilon = 0;
    const float* pre_scale = nullptr;  // (width,)
    Rounding rounding = Rounding::none;
    bool per_token = false;  // int8 by each row's own largest magnitude; else by input_scale
    float input_scale = 1;

    int64_t input_width() const { return gate == Activation::none ? width : 2 * width; }
};

// A linear operation.
struct Linear {
    InputStage stage;
    Matrix weight;
    bool integers = false;  // the weight is int8 or int4, and inputs are made 16-bit integers, block by block
    bool short_inputs = false;  // 16 bits of an input are enough: it is declared to have no more
};

// One row of inputs as integers: numbers = values * scales[i / 128]. For int4 weights the values stand in the order and
// form in which the kernels' unpacked weights want them; `begin` is then where the sums of 128 products begin (int4_bytes.h).
struct IntegerRow {
    int16_t* values = nullptr;
    float* scales = nullptr;
    int32_t* begin = nullptr;  // 16 for every 128 values
};

// An adapter's two matrices for one linear operation (LoRA), of one type.
struct LowRank {
    const void* down = nullptr;  // (rank, width)
    const void* up = nullptr;    // (rank, outputs)
    Dtype dtype = Dtype::f32;    // f32, f16 or bf16
    int64_t rank = 0, width = 0, outputs = 0;
};
constexpr int64_t kRowsOfAdapter = 4;  // tokens that meet an adapter together, at most
constexpr int64_t kMostRank = 1024;

struct Attention {
    Dtype dtype = Dtype::f32;  // of keys and values: f32, f16, bf16 or i8
    int64_t head_size = 0;
    float score_scale = 1;  // of a query's product with a stored key
    float value_scale = 1;  // of stored values
};

// The keys that a token sees, by their numbers: begin <= j < end.
struct SeenKeys {
    int64_t begin, end;
};

// Keys that lie one behind the other, which the next call is going to meet: to be asked for while there is nothing else to
// wait for.
struct NextKeys {
    const char* keys = nullptr;
    int64_t count = 0;
};

// Where the keys of one head lie, and their values: in pages of `page_tokens` tokens each, which the sequence's table names.
struct KeyRows {
    const char* keys = nullptr;  // of page 0
    const int32_t* pages = nullptr;
    int64_t page_tokens = 0;
    int64_t page_bytes = 0;  // from a page to the next one, which need not be the sequence's
    int64_t row_bytes = 0;
    int64_t to_values = 0;   // bytes from a key to its value
};

// A softmax under way: weighted sum of values, its weights' sum, and the largest score so far.
struct Partial {
    float* sums;  // (head_size,), not yet divided by `total`
    float total;
    float largest;
};

struct Kernels {
    const char* name;
    int64_t token_group;  // tokens that are prepared together
    int64_t row_group;    // rows of weights that generated tokens meet together, or a multiple
    int64_t prompt_rows;  // the most rows of weights that prompts meet together, a multiple of kPanelColumns

    // y = layer_norm(x), one row, or rms_norm(x) where bias is nullptr.
    void (*norm)(const float* x, const float* scale, const float* bias, float epsilon, int64_t width, float* y);

    // Linear operations. Inputs of all tokens of a role are prepared first, in whatever form the kernels want them, and then
    // meet the weight's rows, part by part.
    //
    // How many floats of memory `tokens` prepared tokens take; 0 where the inputs can be used as they are.
    int64_t (*prepared_floats)(const Linear& linear, Role role, int64_t tokens);
    // Prepares the tokens begin <= t < end of x (tokens, input width); `begin` is a multiple of token_group. The scratch memory has
    // the padded width.
    void (*prepare)(const Linear& linear, Role role, const float* x, int64_t tokens, int64_t begin, int64_t end,
                    float* prepared, float* scratch);
    // y[t - first, n - begin] = x[t] . row n, scaled, for `count` tokens from `first` on, a multiple of token_group, of the
    // `tokens` that were prepared, and for the weight's rows begin <= n < end: of prompts up to kPanelTokens tokens and
    // prompt_rows rows. The scratch memory has kLinearScratch floats.
    void (*multiply)(const Linear& linear, Role role, const float* prepared, int64_t tokens, int64_t first, int64_t count,
                     int64_t begin, int64_t end, float* y, int64_t y_stride, float* scratch);

    // y = activation(y + bias) + residual; bias and residual may be nullptr.
    void (*finish)(float* y, int64_t count, const float* bias, Activation activation, const float* residual);

    // y = x . down^T . up, of up to kRowsOfAdapter rows of x, x_stride apart; y (rows, outputs). The scratch memory has a rank
    // for each.
    void (*low_rank)(const LowRank& matrices, const float* x, int64_t x_stride, int64_t rows, float* y, float* scratch);

    // y = gate(first half) * second half, of one row (2 * width).
    void (*apply_gate)(const float* x, Activation gate, int64_t width, float* y);

    // y = one stored row, scaled; `y` has the padded width.
    void (*load_row)(const Matrix& matrix, int64_t row, float* y);

    // y[i] = x[i] / scale rounded to the nearest, a half to the even, as one byte: int8, int4 (in the low half) or float8,
    // whatever does not fit saturated. x is f32, f16 or bf16; there is one scale, or one for each number.
    void (*quantize)(const void* x, Dtype from, int64_t count, const float* scale, bool per_number, Dtype to, uint8_t* y);

    // Rounds one head's new row for the cache and stores it there: round(x / scale), in the cache's type.
    void (*store_row)(const float* x, int64_t count, Rounding rounding, float scale, Dtype dtype, void* y);

    // Continues a query's softmax with the keys begin <= j < end.
    void (*attend)(const Attention& attention, const float* q, const KeyRows& rows, int64_t begin, int64_t end,
                   NextKeys next, Partial& partial, float* scratch);
    // The whole softmax of up to kQueryBlock queries, q_stride apart, of which query t sees the keys of seen[t], whose begin
    // and end never lie before those of the query before; the scratch memory has attend_block_floats(head_size) floats.
    void (*attend_block)(const Attention& attention, const float* q, int64_t q_stride, int64_t queries,
                         const SeenKeys* seen, const KeyRows& rows, float* y, int64_t y_stride, float* scratch);
    // The softmaxes of up to kQueryBlock queries, q_stride apart, that see the same keys: as attend, begun anew. The scratch
    // memory is attend_block's.
    void (*attend_group)(const Attention& attention, const float* q, int64_t q_stride, int64_t queries, SeenKeys seen,
                         const KeyRows& rows, Partial* results, float* scratch);
    // y = a head's row x with its first 2 * half dimensions turned: dimension i with i + half, by the cosines (half,) and the
    // sines (half,) behind them. x and y are not the same.
    void (*turn)(const float* x, const float* cosines, int64_t half, int64_t size, float* y);
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
constexpr int64_t kTileWeights = 128;   // amx_linear.h: rows of weights that meet kPanelTokens tokens together,
constexpr int64_t kTileDepth = 512;  // and numbers of each
constexpr int64_t kTileScratch = kTileWeights * (kTileDepth + kPanelTokens);
constexpr int64_t kLinearScratch = kTileScratch > kPanelFloats ? kTileScratch : kPanelFloats;
constexpr int64_t kKeyChunk = 256;  // keys that are attended to together
constexpr int64_t kQueryBlock = 48;
constexpr int64_t attend_block_floats(int64_t head_size) {
    const int64_t wide = (head_size + kPanelColumns - 1) / kPanelColumns * kPanelColumns;
    return kPanelScratch + kQueryBlock * (kPanelColumns + wide) + (2 * kPanelColumns + 1) * wide;
}
constexpr int64_t kAttendFloats = kKeyChunk + 64;
// From so many heads on that share keys, a generated token's meet them in tiles: that a tile is made first pays then.
constexpr int64_t kFewHeads = 4;

namespace portable { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace amx { extern const Kernels kernels, batch_kernels; }
namespace amx_emulated { extern const Kernels kernels; }
namespace neon { extern const Kernels kernels; }
namespace dotprod { extern const Kernels kernels; }
namespace i8mm { extern const Kernels kernels; }

}  // namespace nvtripy_portable

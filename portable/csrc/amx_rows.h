// Integer products of a few generated tokens without tiles, to the bits that tiles give: a tile meets 16 tokens in the time of
// one, so for one to four of them vectors are faster, which the memory keeps waiting.
//
// A row's sum of the weights that share a scale and lie in one block of inputs is exact in either way, and one integer before
// it becomes a float32; what happens to it from there on is one multiply-add after the other, in the same order. 16 sums stand
// side by side in a vector: of 16 rows with one token, of 8 with two, or of 4 with four.
#pragma once

#include "amx_inputs.h"
#include "amx_weights.h"
#include "kernels.h"
#include "simd.h"

namespace nvtripy_portable::ISA {

constexpr int kRowTokens = 4;

inline void prepare_rows(const Linear& linear, const float* x, int64_t begin, int64_t end, float* prepared, float* scratch) {
    const int64_t width = linear.stage.width;
    for (int64_t t = begin; t < end; ++t) {
        IntegerRow row = integer_row(prepared + t * integer_row_floats(width), width);
        normalize(linear.stage, x + t * linear.stage.input_width(), scratch);
        const float row_scale = linear.stage.rounding == Rounding::none ? 1.0f : round_row(linear.stage, scratch);
        for (int64_t start = 0; start < padded_width(width); start += kInputBlock) {
            int16_t values[kInputBlock];
            row.scales[start / kInputBlock] =
                row_scale * round_block(scratch + start, linear.stage.rounding, kLargestInTwoBytes, values);
#if ISA_NUMBER(ISA) == 3
            if (linear.weight.dtype == Dtype::i4) {
                arrange_for_int4(values, row.values + start, row.begin + start / 8);
                continue;
            }
#endif
            std::memcpy(row.values + start, values, sizeof values);
        }
    }
}

// sums[run][t * kRows + r]: of 128 weights of each row with the inputs of block b of each token, run by run.
template <bool kInt4, int kTokens, int kRuns>
inline void block_sums(const uint8_t* const (&w)[kTileSide / kTokens], const IntegerRow (&rows)[kTokens], int64_t b,
                       int32_t (&sums)[kRuns][kTileSide]) {
    const int16_t* x[kTokens];
    for (int t = 0; t < kTokens; ++t) x[t] = rows[t].values + b * kInputBlock;
    constexpr int kRows = static_cast<int>(kTileSide) / kTokens;
#if ISA_NUMBER(ISA) == 3
    // Of int4 a lane has eight neighbours, so that four lanes have 32; of int8 a vector has.
    constexpr int kParts = kInt4 ? 1 : kRuns;
    I lanes[kParts][kTileSide];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
        I run[kParts][kTokens];
        for (int p = 0; p < kParts; ++p)
            for (int t = 0; t < kTokens; ++t) run[p][t] = zero_i();
        if constexpr (kInt4) {
            const I words = _mm512_loadu_si512(w[r]);
            const I even = unsigned_nibbles(words), odd = unsigned_nibbles(_mm512_srli_epi16(words, 4));
            for (int t = 0; t < kTokens; ++t) {
                const int16_t* parts = x[t];
                I high = zero_i(), low = _mm512_loadu_si512(rows[t].begin + b * W);
                add_byte_dot(high, even, load_s(parts));
                add_byte_dot(low, even, load_s(parts + 64));
                add_byte_dot(high, odd, load_s(parts + 32));
                add_byte_dot(low, odd, load_s(parts + 96));
                run[0][t] = _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
            }
        } else {
            for (int i = 0; i < 4; ++i) {
                const S row = widen_i8(reinterpret_cast<const int8_t*>(w[r]) + i * 2 * W);
                for (int t = 0; t < kTokens; ++t) add_dot(run[i * kParts / 4][t], row, load_s(x[t] + i * 2 * W));
            }
        }
        for (int p = 0; p < kParts; ++p)
            for (int t = 0; t < kTokens; ++t) lanes[p][t * kRows + r] = run[p][t];
    }
    if constexpr (kInt4 && kRuns > 1) {
        I quarters[4];  // 32 numbers of each of the 16
        add_quarters(lanes[0], quarters);
        for (int run = 0; run < kRuns; ++run)
            _mm512_store_si512(sums[run], kRuns == 4 ? quarters[run]
                                                     : _mm512_add_epi32(quarters[2 * run], quarters[2 * run + 1]));
    } else {
        for (int run = 0; run < kRuns; ++run) _mm512_store_si512(sums[run], add_lanes(lanes[run]));
    }
#else
    for (int run = 0; run < kRuns; ++run)
        for (int t = 0; t < kTokens; ++t)
            for (int r = 0; r < kRows; ++r) {
                int32_t sum = 0;
                for (int k = run * 128 / kRuns; k < (run + 1) * 128 / kRuns; ++k) {
                    const int packed = w[r][k / 2] >> k % 2 * 4 & 15;
                    sum += x[t][k] * (kInt4 ? (packed ^ 8) - 8 : static_cast<int8_t>(w[r][k]));
                }
                sums[run][t * kRows + r] = sum;
            }
#endif
}

// The scales of blocks, of kRows rows over and over, which stand side by side in a vector: those of 16 blocks at a time, as they
// lie one behind the other in a row. Where there are fewer rows, the last one stands in for the rest.
template <int kRows>
class ColumnScales {
public:
    ColumnScales(const Matrix& weight, int64_t n, int64_t rows) : weight_(weight), n_(n), rows_(rows) {}

    // Vector v of the scales of a block; zeros beyond the weight's end, where there is nothing to scale.
    F at(int64_t block, int v) {
        if (block / kTileSide != at_) fill(block / kTileSide);
        return load(columns_[block % kTileSide] + v * W);
    }

private:
    void fill(int64_t at) {
        at_ = at;
        const int64_t count = smaller(kTileSide, weight_.scale_stride - at * kTileSide);
        for (int i = 0; i < kTileSide; ++i) {
            const int64_t row = n_ + smaller<int64_t>(i % kRows, rows_ - 1);
            const float* from = weight_.scales + row * weight_.scale_stride + at * kTileSide;
            for (int64_t block = 0; block < kTileSide; ++block) columns_[block][i] = block < count ? from[block] : 0.0f;
        }
    }

    const Matrix& weight_;
    int64_t n_, rows_, at_ = -1;
    alignas(64) float columns_[kTileSide][kTileSide];
};

// y of kTokens tokens and of up to 16 / kTokens rows from row n on. Where there are fewer, the last one stands in for the rest.
template <bool kInt4, int kTokens, int kRuns>
inline void row_tile(const Linear& linear, const IntegerRow (&x)[kTokens], int64_t n, int64_t rows, int64_t tokens, float* y,
                     int64_t y_stride) {
    constexpr int kRows = static_cast<int>(kTileSide) / kTokens, kVectors = static_cast<int>(kTileSide) / W;
    constexpr int64_t kBytes = kInt4 ? 64 : 128;  // of 128 weights
    const Matrix& weight = linear.weight;
    const int64_t row_bytes = weight.row_bytes(), blocks = (weight.width + 127) / 128, whole = weight.width / 128;
    const uint8_t* w[kRows];
    for (int r = 0; r < kRows; ++r) {
        const int64_t row = n + smaller<int64_t>(r, rows - 1);
        w[r] = static_cast<const uint8_t*>(weight.data) + row * row_bytes;
    }
    ColumnScales<kRows> scales(weight, n, rows);
    // Asked for in the order of the memory, not in that of the blocks.
    const uint8_t* ahead = w[0] + larger<int64_t>(bytes_ahead(), kRows * row_bytes);
    alignas(64) float totals[kTileSide], x_scales[kTileSide];
    alignas(64) int32_t sums[kRuns][kTileSide];
    uint8_t last[kRows][kBytes];
    F total[kVectors];
    for (F& each : total) each = zero();
    for (int64_t b = 0; b < blocks; ++b) {
        for (int64_t i = 0; i < rows * kBytes; i += 64, ahead += 64) prefetch_once(ahead);
        if (b == whole)  // the rest of the rows, with zeros
            for (int r = 0; r < kRows; ++r) {
                std::memset(last[r], 0, kBytes);
                std::memcpy(last[r], w[r], static_cast<size_t>(row_bytes - whole * kBytes));
                w[r] = last[r];
            }
        block_sums<kInt4, kTokens, kRuns>(w, x, b, sums);
        if (kTokens > 1)
            for (int i = 0; i < kTileSide; ++i) x_scales[i] = x[i / kRows].scales[b];
        for (int v = 0; v < kVectors; ++v) {
            const F x_scale = kTokens == 1 ? set1(x[0].scales[b]) : load(x_scales + v * W);
            for (int run = 0; run < kRuns; ++run) {
                I product;
                std::memcpy(&product, sums[run] + v * W, sizeof product);
                F factor = x_scale;
                if (weight.block) factor = mul(x_scale, scales.at((b * 128 + run * (128 / kRuns)) / weight.block, v));
                total[v] = b + run > 0 ? fma(to_float(product), factor, total[v]) : mul(to_float(product), factor);
            }
        }
        for (int r = 0; r < kRows; ++r) w[r] += kBytes;
    }
    for (int v = 0; v < kVectors; ++v) store(totals + v * W, total[v]);
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = 0; r < rows; ++r) y[t * y_stride + r] = totals[t * kRows + r] * row_scale_of(linear, n + r);
}

template <bool kInt4, int kTokens>
inline void rows_of(const Linear& linear, const float* prepared, int64_t tokens, int64_t begin, int64_t end, float* y,
                    int64_t y_stride) {
    constexpr int64_t kRows = kTileSide / kTokens;
    const int64_t width = linear.stage.width, run = run_of(linear.weight);
    IntegerRow x[kTokens];
    for (int64_t t = 0; t < kTokens; ++t)
        x[t] = integer_row(const_cast<float*>(prepared) + smaller(t, tokens - 1) * integer_row_floats(width), width);
    for (int64_t n = begin; n < end; n += kRows) {
        const int64_t rows = smaller(kRows, end - n);
        float* to = y + (n - begin);
        if (run == 128) row_tile<kInt4, kTokens, 1>(linear, x, n, rows, tokens, to, y_stride);
        else if (run == 64) row_tile<kInt4, kTokens, 2>(linear, x, n, rows, tokens, to, y_stride);
        else row_tile<kInt4, kTokens, 4>(linear, x, n, rows, tokens, to, y_stride);
    }
}

// Up to kRowTokens tokens.
inline void multiply_rows(const Linear& linear, const float* prepared, int64_t tokens, int64_t begin, int64_t end, float* y,
                          int64_t y_stride) {
    const bool int4 = linear.weight.dtype == Dtype::i4;
    if (tokens == 1) {
        if (int4) rows_of<true, 1>(linear, prepared, tokens, begin, end, y, y_stride);
        else rows_of<false, 1>(linear, prepared, tokens, begin, end, y, y_stride);
    } else if (tokens == 2) {
        if (int4) rows_of<true, 2>(linear, prepared, tokens, begin, end, y, y_stride);
        else rows_of<false, 2>(linear, prepared, tokens, begin, end, y, y_stride);
    } else {
        if (int4) rows_of<true, 4>(linear, prepared, tokens, begin, end, y, y_stride);
        else rows_of<false, 4>(linear, prepared, tokens, begin, end, y, y_stride);
    }
}

}  // namespace nvtripy_portable::ISA

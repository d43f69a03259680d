// Stored rows as float32.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace nvtripy_portable::ISA {

template <class Numbers>
inline void scaled_run(const typename Numbers::Stored* p, int64_t count, float scale, float* y) {
    const F by = set1(scale * Numbers::kFactor);
    int64_t i = 0;
    for (; i + W <= count; i += W) store(y + i, mul(Numbers::load(p + i), by));
    if (i < count) store_part(y + i, mul(load_part<Numbers>(p + i, count - i), by), count - i);
}

// 16 bytes as 32 numbers. As a word each byte has its second number in the high half already; the first is brought to
// the place of the low byte.
inline void unpack_32(const uint8_t* packed, int8_t* values) {
    uint16_t words[16];
    for (int j = 0; j < 16; ++j) {
        const uint16_t both = static_cast<uint16_t>((packed[j] & 15) | ((packed[j] & 0xf0) << 4));
        words[j] = static_cast<uint16_t>((both ^ 0x0808) | 0x8080);
    }
    // Each byte is 128 + 8 + the number by now.
    int8_t bytes[32];
    std::memcpy(bytes, words, sizeof bytes);
    for (int j = 0; j < 32; ++j) values[j] = static_cast<int8_t>(static_cast<uint8_t>(bytes[j]) - 136);
}

// `first` is even.
inline void scaled_run_i4(const uint8_t* bytes, int64_t first, int64_t count, float scale, float* y) {
    const F by = set1(scale);
    bytes += first / 2;
    for (int64_t i = 0; i < count; i += 32) {
        const int64_t here = smaller<int64_t>(32, count - i);
        if (here == 32) {
            alignas(32) int8_t values[32];
            unpack_32(bytes + i / 2, values);
            for (int j = 0; j < 32; j += W) store(y + i + j, mul(load_i8(values + j), by));
            continue;
        }
        uint8_t packed[16] = {};
        std::memcpy(packed, bytes + i / 2, static_cast<size_t>((here + 1) / 2));
        int8_t values[32];
        for (int j = 0; j < 16; ++j) {
            values[2 * j] = static_cast<int8_t>(((packed[j] & 15) ^ 8) - 8);
            values[2 * j + 1] = static_cast<int8_t>(((packed[j] >> 4) ^ 8) - 8);
        }
        for (int64_t j = 0; j < here; ++j) y[i + j] = static_cast<float>(values[j]) * scale;
    }
}

// y = numbers first <= k < first + count of a row, scaled.
inline void dequantize(const Matrix& matrix, int64_t row, int64_t first, int64_t count, float* y) {
    const auto* bytes = static_cast<const uint8_t*>(matrix.data) + row * matrix.row_bytes();
    for (int64_t done = 0; done < count;) {
        int64_t run = count - done;
        float scale = 1;
        const int64_t k = first + done;
        if (matrix.block) {
            run = smaller(run, matrix.block - k % matrix.block);
            scale = matrix.scales[row * matrix.scale_stride + k / matrix.block];
        } else if (matrix.scales) {
            scale = matrix.scales[row * matrix.scale_stride];
        }
        float* to = y + done;
        switch (matrix.dtype) {
            case Dtype::f32: scaled_run<F32>(reinterpret_cast<const float*>(bytes) + k, run, scale, to); break;
            case Dtype::f16: scaled_run<F16>(reinterpret_cast<const uint16_t*>(bytes) + k, run, scale, to); break;
            case Dtype::bf16: scaled_run<BF16>(reinterpret_cast<const uint16_t*>(bytes) + k, run, scale, to); break;
            case Dtype::i8: scaled_run<I8>(reinterpret_cast<const int8_t*>(bytes) + k, run, scale, to); break;
            case Dtype::i4: scaled_run_i4(bytes, k, run, scale, to); break;
            case Dtype::f8:
                if (matrix.has_nan) scaled_run<F8WithNaN>(bytes + k, run, scale, to);
                else scaled_run<F8>(bytes + k, run, scale, to);
                break;
        }
        done += run;
    }
}

}  // namespace nvtripy_portable::ISA

// Copies of key-value caches and of rows in them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace nvtripy_portable {

// Copies into memory that is all zero, leaving out pages that are: neither side comes to need memory for them.
inline void copy_nonzero(char* to, const char* from, size_t bytes) {
    constexpr size_t kPage = 4096;
    for (size_t start = 0; start < bytes; start += kPage) {
        const size_t count = std::min(kPage, bytes - start);
        const char* page = from + start;
        // A page that equals itself moved by one byte has one value throughout.
        if (page[0] == 0 && std::memcmp(page, page + 1, count - 1) == 0) continue;
        std::memcpy(to + start, page, count);
    }
}

// The rows that a step of `length` tokens at position (B,) writes into a cache (heads_before_batch, B, H, C, row_bytes):
// out of the cache into `saved` (heads_before_batch, B, H, length, row_bytes), or back.
inline void exchange_rows(char* cache, char* saved, const int32_t* position, int64_t halves, int64_t batch,
                          int64_t heads, int64_t context, int64_t row_bytes, int64_t length, bool restore) {
    for (int64_t half = 0; half < halves; ++half)
        for (int64_t b = 0; b < batch; ++b) {
            const int64_t first = std::clamp<int64_t>(position[b], 0, context);
            const int64_t last = std::clamp<int64_t>(position[b] + length, 0, context);
            const size_t bytes = static_cast<size_t>(std::max<int64_t>(last - first, 0) * row_bytes);
            for (int64_t h = 0; h < heads; ++h) {
                const int64_t head = (half * batch + b) * heads + h;
                char* inside = cache + (head * context + first) * row_bytes;
                char* outside = saved + head * length * row_bytes;
                if (restore) std::memcpy(inside, outside, bytes);
                else std::memcpy(outside, inside, bytes);
            }
        }
}

}  // namespace nvtripy_portable

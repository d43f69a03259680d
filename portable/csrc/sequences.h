// Which sequences a step goes on with, where their keys and values lie, and how attention is shared out.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace nvtripy_portable {

// Tokens of one sequence that stand one behind the other.
struct Segment {
    int64_t row = 0;       // of the first one, in the step
    int64_t count = 0;
    int64_t position = 0;  // of the first one, in its sequence
    Role role = Role::prompt;
    const int32_t* pages = nullptr;  // the sequence's table
    int64_t capacity = 0;            // tokens that its pages hold
    int32_t slot = 0;                // of its adapter

    // The keys that token t sees: as many as `window`, its own included, or all where that is 0.
    SeenKeys seen(int64_t t, int64_t window) const {
        const int64_t end = position + t + 1;
        return {window ? std::clamp<int64_t>(end - window, 0, capacity) : 0, std::clamp<int64_t>(end, 0, capacity)};
    }
};

// Keys and values, written in place, in pages of `page_tokens` tokens: (pages, L, 2, H, P, D), or as a graph has its cache,
// (L, 2, B, H, C, D), which is a page for each sequence.
struct Cache {
    void* data = nullptr;
    Dtype dtype = Dtype::f32;
    int64_t layers = 0, pages = 0, heads = 0, page_tokens = 0, head_size = 0;
    bool is_pool = false;

    int64_t row_bytes() const { return head_size * (dtype == Dtype::f32 ? 4 : dtype == Dtype::i8 ? 1 : 2); }
    int64_t page_half() const { return heads * page_tokens * row_bytes(); }  // bytes of a layer's keys in a page
    int64_t bytes() const { return pages * layers * 2 * page_half(); }

    // Where a head's rows are, in a sequence with this table.
    KeyRows rows(int64_t layer, int64_t head, const int32_t* table) const {
        const int64_t half = is_pool ? page_half() : pages * page_half();
        const int64_t page = is_pool ? layers * 2 * page_half() : page_half();
        const char* first = static_cast<const char*>(data) + layer * 2 * half + head * page_tokens * row_bytes();
        return {first, table, page_tokens, page, row_bytes(), half};
    }
};

// The place of a token's key.
inline char* key_at(const KeyRows& rows, int64_t slot) {
    return const_cast<char*>(rows.keys) + rows.pages[slot / rows.page_tokens] * rows.page_bytes +
           slot % rows.page_tokens * rows.row_bytes;
}

// The segments of a step, and attention's units of work, which depend on nothing but each sequence: of a generated token
// its keys in chunks of a fixed size, so that long contexts have work for all threads; of a prompt blocks of queries.
struct Sequences {
    struct Chunk {
        int64_t segment, token;  // of the segment
        int64_t begin, end;      // keys
        int64_t first, count;    // the token's chunks: the number of the first one, and how many there are
    };
    struct Block {
        int64_t segment, token, count;
    };

    std::vector<Segment> segments;
    std::vector<Chunk> chunks;
    std::vector<Block> blocks;
    std::vector<int64_t> stored_first;  // segments whose keys and values are stored before anyone attends
    bool has_parts = false;             // a token with more chunks than one

    // From where the positions come, how many sequences of which length, and what they can hold: two operations with the
    // same of these share the plan. So do the window, and by what queries and keys are turned.
    int key = 0;
    int64_t batch = 0, length = 0, capacity = 0, window = 0;
    const float* frequencies = nullptr;
    std::vector<int32_t> identity;  // the page of each sequence, where it has one
    std::vector<float> turns;       // of each row of the step the cosines, (half,), and the sines

    // In float32, as the models have learned it.
    void find_turns(int64_t half) {
        int64_t rows = 0;
        for (const Segment& segment : segments) rows = std::max(rows, segment.row + segment.count);
        turns.resize(static_cast<size_t>(rows * 2 * half));
        for (const Segment& segment : segments)
            for (int64_t t = 0; t < segment.count; ++t) {
                float* to = turns.data() + (segment.row + t) * 2 * half;
                for (int64_t i = 0; i < half; ++i) {
                    const float angle = static_cast<float>(segment.position + t) * frequencies[i];
                    to[i] = std::cos(angle);
                    to[half + i] = std::sin(angle);
                }
            }
    }

    void plan() {
        chunks.clear();
        blocks.clear();
        stored_first.clear();
        has_parts = false;
        for (size_t s = 0; s < segments.size(); ++s) {
            const Segment& segment = segments[s];
            const auto number = static_cast<int64_t>(s);
            if (segment.count == 0) continue;
            if (segment.role == Role::prompt || segment.count > 1) stored_first.push_back(number);
            if (segment.role == Role::prompt) {
                // The last queries see the most keys: they are shared out first.
                for (int64_t t = (segment.count - 1) / kQueryBlock * kQueryBlock; t >= 0; t -= kQueryBlock)
                    blocks.push_back({number, t, std::min(kQueryBlock, segment.count - t)});
                continue;
            }
            for (int64_t t = 0; t < segment.count; ++t) {
                // Chunks end at multiples of their size, wherever the window begins.
                const SeenKeys seen = segment.seen(t, window);
                const int64_t first = static_cast<int64_t>(chunks.size()), start = seen.begin / kKeyChunk;
                const int64_t count = std::max<int64_t>((seen.end + kKeyChunk - 1) / kKeyChunk - start, 1);
                for (int64_t c = start; c < start + count; ++c)
                    chunks.push_back({number, t, std::max(c * kKeyChunk, seen.begin), std::min((c + 1) * kKeyChunk, seen.end),
                                      first, count});
                has_parts |= count > 1;
            }
        }
    }
};

}  // namespace nvtripy_portable

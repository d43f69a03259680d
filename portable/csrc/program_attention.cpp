// Attention over stored keys and values, shared out by sequence, group of heads and key chunk (sequences.h).
#include <limits>

#include "program.h"

namespace nvtripy_portable {

void Program::attention(const Operation& operation, Call& call, ThreadPool& pool) {
    const Value &x = value(operation.x), &y = value(operation.y);
    const Sequences& sequences = sequences_of(call, operation, x);
    const int64_t heads = operation.heads, groups = operation.groups, size = operation.head_size, half = operation.half;
    const int64_t repeat = heads / groups, width = heads * size, stride = (heads + 2 * groups) * size;

    // Without a cache this call's keys and values stand in scratch memory of the same form.
    Cache cache{shared_.data(), Dtype::f32, 1, x.batch, groups, x.length, size};
    int64_t layer = 0;
    if (operation.cache != kNone) {
        cache = call.caches[static_cast<size_t>(operation.cache)];
        layer = operation.layer;
    }
    const bool rounds = operation.rounding != Rounding::none;
    const float value_scale = rounds ? operation.v_scale : 1.0f;
    const Attention form{cache.dtype, size, operation.score_scale * (rounds ? operation.k_scale : 1.0f), value_scale};
    // A head's query, behind them a group's key, behind those its value.
    const auto at = [&](int64_t row, int64_t number) { return x.data + row * stride + number * size; };
    const auto turn_memory = [&](int thread) { return memory_of(thread) + attend_block_floats(size); };
    // A query or a key as it is multiplied: turned, in `memory`, where the operation does.
    const auto turned = [&](int64_t row, int64_t number, float* memory) -> const float* {
        if (!operation.frequencies) return at(row, number);
        kernels_.turn(at(row, number), sequences.turns.data() + row * 2 * half, half, size, memory);
        return memory;
    };
    // A token whose slot there is not is not written.
    const auto store = [&](const Segment& segment, int64_t t, const KeyRows& rows, int64_t group, int thread) {
        const int64_t slot = segment.position + t, row = segment.row + t;
        if (slot < 0 || slot >= segment.capacity) return;
        char* key = key_at(rows, slot);
        kernels_.store_row(turned(row, heads + group, turn_memory(thread)), size, operation.rounding, operation.k_scale,
                           cache.dtype, key);
        kernels_.store_row(at(row, heads + groups + group), size, operation.rounding, operation.v_scale, cache.dtype,
                           key + rows.to_values);
    };

    // A generated token's heads of one group meet the same keys one after the other, unless threads would be left without
    // work: then their new keys have to be there before.
    const auto chunk_groups = static_cast<int64_t>(sequences.chunks.size()) * groups;
    const int64_t shares = std::clamp<int64_t>(divide_up(2 * pool.team(), std::max<int64_t>(chunk_groups, 1)), 1, repeat);
    const int64_t together = std::min(divide_up(repeat, shares), kQueryBlock), parts = divide_up(repeat, together);

    const auto to_store = static_cast<int64_t>(parts > 1 ? sequences.segments.size() : sequences.stored_first.size());
    if (to_store > 0)
        pool.each(to_store * groups, [&](int64_t unit, int thread) {
            const int64_t number = parts > 1 ? unit / groups : sequences.stored_first[static_cast<size_t>(unit / groups)];
            const Segment& segment = sequences.segments[static_cast<size_t>(number)];
            const KeyRows rows = cache.rows(layer, unit % groups, segment.pages);
            for (int64_t t = 0; t < segment.count; ++t) store(segment, t, rows, unit % groups, thread);
        });

    const auto blocks = static_cast<int64_t>(sequences.blocks.size());
    pool.each(blocks * heads, [&](int64_t unit, int thread) {
        const Sequences::Block& block = sequences.blocks[static_cast<size_t>(unit / heads)];
        const Segment& segment = sequences.segments[static_cast<size_t>(block.segment)];
        const int64_t h = unit % heads, row = segment.row + block.token;
        SeenKeys seen[kQueryBlock];
        for (int64_t i = 0; i < block.count; ++i) seen[i] = segment.seen(block.token + i, operation.window);
        float* memory = turn_memory(thread);
        if (operation.frequencies)
            for (int64_t i = 0; i < block.count; ++i) turned(row + i, h, memory + i * size);
        const float* queries = operation.frequencies ? memory : at(row, h);
        kernels_.attend_block(form, queries, operation.frequencies ? size : stride, block.count, seen,
                              cache.rows(layer, h / repeat, segment.pages), y.data + row * width + h * size, width,
                              memory_of(thread));
    });

    const int64_t units = chunk_groups * parts;
    const auto chunk_of = [&](int64_t unit) -> const Sequences::Chunk& {
        return sequences.chunks[static_cast<size_t>(unit / parts / groups)];
    };
    const auto group_of = [&](int64_t unit) { return unit / parts % groups; };
    const auto segment_of = [&](const Sequences::Chunk& chunk) -> const Segment& {
        return sequences.segments[static_cast<size_t>(chunk.segment)];
    };
    // A partial softmax: its sum of weights, its largest score, its sums.
    const auto part = [&](int64_t chunk, int64_t h) { return shared_.data() + (chunk * heads + h) * (size + 2); };
    // What is asked for while a unit is computed: the next one's keys, and the place of its value, unless that unit is another
    // thread's.
    const auto next_keys = [&](int64_t unit, int thread) -> NextKeys {
        if (unit + 1 >= pool.end_of_range(units, thread)) return {};
        const Sequences::Chunk& next = chunk_of(unit + 1);
        if (next.end <= next.begin) return {};
        const KeyRows rows = cache.rows(layer, group_of(unit + 1), segment_of(next).pages);
        const int64_t here = std::min(rows.page_tokens - next.begin % rows.page_tokens, next.end - next.begin);
        __builtin_prefetch(key_at(rows, next.end - 1) + rows.to_values, 1);
        return {key_at(rows, next.begin), here};
    };
    pool.each(units, [&](int64_t unit, int thread) {
        const Sequences::Chunk& chunk = chunk_of(unit);
        const Segment& segment = segment_of(chunk);
        const int64_t group = group_of(unit), row = segment.row + chunk.token, number = unit / parts / groups;
        const KeyRows rows = cache.rows(layer, group, segment.pages);
        // The new row is in the last chunk that is seen; whoever comes to it writes it.
        if (parts == 1 && segment.count == 1 && number == chunk.first + chunk.count - 1) store(segment, 0, rows, group, thread);
        float* own = memory_of(thread);
        const int64_t first_head = group * repeat + unit % parts * together;
        const int64_t end_head = std::min(first_head + together, (group + 1) * repeat);
        float* turns = turn_memory(thread);
        const auto partial_of = [&](int64_t h) {
            float* kept = chunk.count == 1 ? turns + kQueryBlock * size + (h - first_head) * (size + 2) : part(number, h);
            return Partial{kept + 2, 0, -std::numeric_limits<float>::infinity()};
        };
        const auto keep = [&](const Partial& partial, int64_t h) {
            if (chunk.count == 1) {
                kernels_.divide(partial, value_scale, size, y.data + row * width + h * size);
            } else {
                float* kept = part(number, h);
                kept[0] = partial.total;
                kept[1] = partial.largest;
            }
        };
        if (repeat >= kFewHeads) {
            const int64_t count = end_head - first_head;
            if (operation.frequencies)
                for (int64_t i = 0; i < count; ++i) turned(row, first_head + i, turns + i * size);
            Partial partials[kQueryBlock];
            for (int64_t i = 0; i < count; ++i) partials[i] = partial_of(first_head + i);
            kernels_.attend_group(form, operation.frequencies ? turns : at(row, first_head), size, count,
                                  {chunk.begin, chunk.end}, rows, partials, own);
            for (int64_t i = 0; i < count; ++i) keep(partials[i], first_head + i);
            return;
        }
        for (int64_t h = first_head; h < end_head; ++h) {
            Partial partial = partial_of(h);
            std::fill(partial.sums, partial.sums + size, 0.0f);
            kernels_.attend(form, turned(row, h, turns), rows, chunk.begin, chunk.end,
                            h + 1 == end_head ? next_keys(unit, thread) : NextKeys{}, partial, own);
            keep(partial, h);
        }
    });
    if (!sequences.has_parts) return;
    // The chunks are put together in their order.
    pool.each(static_cast<int64_t>(sequences.chunks.size()) * heads, [&](int64_t unit, int) {
        const Sequences::Chunk& chunk = sequences.chunks[static_cast<size_t>(unit / heads)];
        const int64_t h = unit % heads;
        if (chunk.count == 1 || unit / heads != chunk.first) return;
        const auto partial_of = [&](int64_t number) {
            float* kept = part(number, h);
            return Partial{kept + 2, kept[0], kept[1]};
        };
        Partial first = partial_of(chunk.first);
        for (int64_t i = 1; i < chunk.count; ++i) kernels_.merge(first, partial_of(chunk.first + i), size);
        kernels_.divide(first, value_scale, size, y.data + (segment_of(chunk).row + chunk.token) * width + h * size);
    });
}

}  // namespace nvtripy_portable

#include "program.h"

#include <algorithm>
#include <limits>

namespace nvtripy_portable {

namespace {

constexpr int64_t kFewTokens = 4;        // up to here weights are used as they are stored
constexpr int64_t kManyQueries = 12;     // from here on keys and values are widened once for a block of queries
constexpr int64_t kUnitBytes = 32 << 10; // of weights: the least that is worth sharing out
constexpr int64_t kUnits = 32;           // that a large weight is cut into

int64_t padded(int64_t width) { return (width + kInputBlock - 1) / kInputBlock * kInputBlock; }
int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The index that NumPy would take: negative ones count from the end.
int64_t wrapped(int64_t index, int64_t length) { return index < 0 ? index + length : index; }

void check_index(const char* what, int64_t index, int64_t length) {
    if (index < -length || index >= length)
        throw IndexError(std::string(what) + " expects indices in [-" + std::to_string(length) + ", " +
                         std::to_string(length) + ") but got " + std::to_string(index));
}

bool is_plain(const InputStage& stage) {
    return !stage.norm_scale && !stage.pre_scale && stage.rounding == Rounding::none && stage.width % kInputBlock == 0;
}

bool takes_integers(const Operation& operation) {
    return operation.takes_integers && (operation.weight.dtype == Dtype::i8 || operation.weight.dtype == Dtype::i4) &&
           operation.stage.rounding != Rounding::f8;
}

// Values, where their sums begin, and scales, which are made to end at a cache line.
int64_t integer_row_floats(int64_t width) {
    return padded(width) / 2 + padded(width) / 8 + (padded(width) / kInputBlock + 15) / 16 * 16;
}

IntegerRow integer_row(float* memory, int64_t width) {
    float* begin = memory + padded(width) / 2;
    return {reinterpret_cast<int16_t*>(memory), begin + padded(width) / 8, reinterpret_cast<int32_t*>(begin)};
}

}  // namespace

struct Program::Call {
    const std::vector<IntegerInput>& integers;
    const std::vector<Cache>& caches;
    const std::vector<FloatArray>& inputs;
    const std::vector<FloatArray>& outputs;
};

Program::Program(const Kernels& kernels, std::vector<Operation> operations, std::vector<int> buffers,
                 std::vector<int64_t> widths, std::vector<int> inputs, std::vector<int> outputs)
    : kernels_(kernels),
      operations_(std::move(operations)),
      buffers_(std::move(buffers)),
      widths_(std::move(widths)),
      inputs_(std::move(inputs)),
      outputs_(std::move(outputs)),
      values_(buffers_.size()) {
    int last_buffer = kNone;
    for (const int buffer : buffers_) last_buffer = std::max(last_buffer, buffer);
    memory_ = std::vector<Memory>(static_cast<size_t>(last_buffer + 1));
    int64_t widest = 0, head_size = 0;
    for (const Operation& operation : operations_) {
        head_size = std::max(head_size, operation.head_size);
        widest = std::max({widest, operation.stage.width, operation.weight.width, operation.head_size});
    }
    // For a few tokens: their inputs in float32, then as integers; besides a panel, or scores and partial sums.
    thread_floats_ = (kFewTokens + 1) * padded(widest) + kFewTokens * integer_row_floats(widest) +
                     std::max({kPanelFloats, kPanelScratch, attend_block_floats(head_size),
                               kAttendFloats + kQueryTile * padded(widest)}) + 64;
}

void Program::plan(Call& call) {
    if (call.inputs.size() != inputs_.size() || call.outputs.size() != outputs_.size())
        throw std::invalid_argument("expected " + std::to_string(inputs_.size()) + " float inputs and " +
                                    std::to_string(outputs_.size()) + " outputs");
    for (Value& value : values_) value = Value{};
    for (size_t i = 0; i < inputs_.size(); ++i)
        values_[static_cast<size_t>(inputs_[i])] = {call.inputs[i].data, call.inputs[i].batch, call.inputs[i].length};

    int64_t shared = 0;
    for (const Operation& operation : operations_) {
        Value& y = values_[static_cast<size_t>(operation.y)];
        if (operation.x != kNone) {
            const Value& x = values_[static_cast<size_t>(operation.x)];
            y.batch = x.batch;
            y.length = x.length;
        }
        const auto batch_of = [&](int input, const char* what) {
            const IntegerInput& integers = call.integers[static_cast<size_t>(input)];
            if (integers.batch * integers.length != y.batch)
                throw std::invalid_argument(std::string(what) + ": expected " + std::to_string(y.batch) +
                                            " numbers but got " + std::to_string(integers.batch * integers.length));
            return integers.data;
        };
        switch (operation.kind) {
            case Kind::embedding: {
                const IntegerInput& tokens = call.integers[static_cast<size_t>(operation.tokens)];
                y.batch = tokens.batch;
                y.length = tokens.length;
                for (int64_t i = 0; i < y.rows(); ++i)
                    check_index("gather of token embeddings", tokens.data[i], operation.weight.rows);
                const int32_t* position = operation.position == kNone ? nullptr : batch_of(operation.position, "position");
                for (int64_t b = 0; b < y.batch && y.length > 0; ++b) {
                    const int64_t first = position ? position[b] : 0;
                    check_index("gather of position embeddings", first, operation.positions.rows);
                    check_index("gather of position embeddings", first + y.length - 1, operation.positions.rows);
                }
                break;
            }
            case Kind::last_rows: {
                const int32_t* last = batch_of(operation.last, "last");
                for (int64_t b = 0; b < y.batch; ++b)
                    check_index("gather of last rows", b * y.length + last[b], y.rows());
                y.length = 1;
                break;
            }
            case Kind::attention: {
                if (operation.cache == kNone) {
                    shared = std::max(shared, 2 * y.rows() * operation.heads * operation.head_size);
                    break;
                }
                const Cache& cache = call.caches[static_cast<size_t>(operation.cache)];
                batch_of(operation.position, "position");
                if (cache.batch != y.batch || cache.heads != operation.heads ||
                    cache.head_size != operation.head_size || operation.layer >= cache.layers)
                    throw std::invalid_argument("attention: the cache does not fit the queries");
                // Partial softmaxes, where keys are cut into chunks.
                shared = std::max(shared, y.rows() * operation.heads * divide_up(cache.context, kKeyChunk) *
                                              (operation.head_size + 2) * (y.length == 1 ? 1 : 0));
                break;
            }
            case Kind::linear:
                if (y.rows() <= kFewTokens) break;
                if (takes_integers(operation))
                    shared = std::max(shared, y.rows() * integer_row_floats(operation.stage.width));
                else if (!is_plain(operation.stage))
                    shared = std::max(shared, y.rows() * padded(operation.stage.width));
                break;
            default: break;
        }
    }
    shared_.reserve(shared);

    std::vector<int64_t> sizes(memory_.size(), 0);
    for (size_t v = 0; v < values_.size(); ++v)
        if (buffers_[v] != kNone) {
            int64_t& size = sizes[static_cast<size_t>(buffers_[v])];
            size = std::max(size, values_[v].rows() * widths_[v]);
        }
    for (size_t b = 0; b < memory_.size(); ++b) memory_[b].reserve(sizes[b]);
    for (size_t v = 0; v < values_.size(); ++v)
        if (buffers_[v] != kNone) values_[v].data = memory_[static_cast<size_t>(buffers_[v])].data();
    for (size_t i = 0; i < outputs_.size(); ++i) {
        Value& value = values_[static_cast<size_t>(outputs_[i])];
        if (value.rows() != call.outputs[i].batch * call.outputs[i].length)
            throw std::invalid_argument("output " + std::to_string(i) + " has the wrong shape");
        value.data = call.outputs[i].data;
    }
}

void Program::run(const std::vector<IntegerInput>& integers, const std::vector<Cache>& caches,
                  const std::vector<FloatArray>& inputs, const std::vector<FloatArray>& outputs) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Call call{integers, caches, inputs, outputs};
    plan(call);
    ThreadPool::instance().run([&](ThreadPool& workers) {
        const auto threads = static_cast<size_t>(workers.team());
        if (thread_memory_.size() < threads) thread_memory_.resize(threads);
        for (Memory& memory : thread_memory_) memory.reserve(thread_floats_);
        for (const Operation& operation : operations_) execute(operation, call, workers);
    });
}

void Program::execute(const Operation& operation, const Call& call, ThreadPool& pool) {
    switch (operation.kind) {
        case Kind::layer_norm: layer_norm(operation, call, pool); break;
        case Kind::linear: linear(operation, call, pool); break;
        case Kind::embedding: embedding(operation, call, pool); break;
        case Kind::last_rows: last_rows(operation, call, pool); break;
        case Kind::attention: attention(operation, call, pool); break;
    }
}

void Program::layer_norm(const Operation& operation, const Call&, ThreadPool& pool) {
    const Value& x = values_[static_cast<size_t>(operation.x)];
    const Value& y = values_[static_cast<size_t>(operation.y)];
    const int64_t width = operation.stage.width;
    pool.each(x.rows(), [&](int64_t row, int) {
        kernels_.layer_norm(x.data + row * width, operation.stage.norm_scale, operation.stage.norm_bias,
                            operation.stage.epsilon, width, y.data + row * width);
    });
}

void Program::linear(const Operation& operation, const Call&, ThreadPool& pool) {
    const InputStage& stage = operation.stage;
    const Matrix& weight = operation.weight;
    const Value& x = values_[static_cast<size_t>(operation.x)];
    const Value& y = values_[static_cast<size_t>(operation.y)];
    const float* residual =
        operation.residual == kNone ? nullptr : values_[static_cast<size_t>(operation.residual)].data;
    const int64_t tokens = x.rows(), width = stage.width, wide = padded(width), outputs = weight.rows;
    const auto finish = [&](int64_t first, int64_t count, int64_t begin, int64_t end) {
        for (int64_t t = first; t < first + count; ++t)
            kernels_.finish(y.data + t * outputs + begin, end - begin, operation.bias ? operation.bias + begin : nullptr,
                            operation.activation, residual ? residual + t * outputs + begin : nullptr);
    };
    // Units of work depend on shapes alone, never on the number of threads.
    if (tokens <= kFewTokens) {
        const int64_t by_bytes = divide_up(kUnitBytes, std::max<int64_t>(weight.row_bytes(), 1));
        const int64_t rows = divide_up(std::max(by_bytes, divide_up(outputs, kUnits)), 12) * 12;
        const bool integer = takes_integers(operation), plain = is_plain(stage);
        const int64_t integer_floats = integer_row_floats(width);
        const int64_t units = divide_up(outputs, rows);
        // A few rows are prepared by every thread for itself: that is sooner done than waited for. Its first weights come
        // meanwhile.
        const auto prepare = [&](int thread) {
            float* own = memory_of(thread);
            const char* first = static_cast<const char*>(weight.data) +
                                pool.end_of_range(units, thread - 1) * rows * weight.row_bytes();
            for (int64_t i = 0; i < kBytesAhead; i += 64) __builtin_prefetch(first + i, 0, 0);
            if (integer)
                for (int64_t t = 0; t < tokens; ++t)
                    kernels_.prepare_integers(stage, weight.dtype, x.data + t * width, own + tokens * integer_floats,
                                              integer_row(own + t * integer_floats, width));
            else if (!plain)
                for (int64_t t = 0; t < tokens; ++t) kernels_.prepare(stage, x.data + t * width, own + t * wide);
        };
        pool.each(units, prepare, [&](int64_t unit, int thread) {
            float* own = memory_of(thread);
            const int64_t begin = unit * rows, end = std::min(begin + rows, outputs);
            if (integer) {
                IntegerRow integers[kFewTokens];
                for (int64_t t = 0; t < tokens; ++t) integers[t] = integer_row(own + t * integer_floats, width);
                kernels_.integer_products(weight, integers, tokens, begin, end, y.data + begin, outputs);
            } else {
                kernels_.products(weight, plain ? x.data : own, plain ? width : wide, tokens, begin, end,
                                  y.data + begin, outputs, plain ? own : own + tokens * wide);
            }
            finish(0, tokens, begin, end);
        });
        return;
    }
    // Many tokens: all inputs are prepared first, then panels of weights meet up to kPanelTokens of them.
    const bool integer = takes_integers(operation), plain = is_plain(stage) && !integer;
    const int64_t stride = integer ? integer_row_floats(width) : plain ? width : wide;
    const float* rows_in = plain ? x.data : shared_.data();
    if (!plain)
        pool.each(divide_up(tokens, 4), [&](int64_t unit, int thread) {
            for (int64_t t = unit * 4; t < std::min(unit * 4 + 4, tokens); ++t) {
                float* to = shared_.data() + t * stride;
                if (integer)
                    kernels_.prepare_panel_integers(stage, weight.dtype, x.data + t * width, memory_of(thread),
                                                    integer_row(to, width));
                else
                    kernels_.prepare(stage, x.data + t * width, to);
            }
        });
    const int64_t columns = divide_up(outputs, kPanelColumns), blocks = divide_up(tokens, kPanelTokens);
    const int64_t block = divide_up(tokens, blocks);
    pool.each(columns * blocks, [&](int64_t unit, int thread) {
        const int64_t first = unit / columns * block, count = std::min(block, tokens - first);
        const int64_t begin = unit % columns * kPanelColumns, end = std::min(begin + kPanelColumns, outputs);
        float* to = y.data + first * outputs + begin;
        if (integer)
            kernels_.integer_panels(weight, integer_row(shared_.data() + first * stride, width), stride, count, begin,
                                    end, to, outputs, memory_of(thread));
        else
            kernels_.float_panels(weight, rows_in + first * stride, stride, count, begin, end, to, outputs,
                                  memory_of(thread));
        finish(first, count, begin, end);
    });
}

void Program::embedding(const Operation& operation, const Call& call, ThreadPool& pool) {
    const IntegerInput& tokens = call.integers[static_cast<size_t>(operation.tokens)];
    const Value& y = values_[static_cast<size_t>(operation.y)];
    const int64_t width = operation.weight.width;
    pool.each(y.rows(), [&](int64_t row, int thread) {
        float* own = memory_of(thread);
        const int64_t b = row / y.length, t = row % y.length;
        const int64_t first =
            operation.position == kNone ? 0 : call.integers[static_cast<size_t>(operation.position)].data[b];
        float* to = y.data + row * width;
        kernels_.load_row(operation.weight, wrapped(tokens.data[row], operation.weight.rows), to);
        kernels_.load_row(operation.positions, wrapped(first + t, operation.positions.rows), own);
        for (int64_t i = 0; i < width; ++i) to[i] += own[i];
    });
}

void Program::last_rows(const Operation& operation, const Call& call, ThreadPool& pool) {
    const int32_t* last = call.integers[static_cast<size_t>(operation.last)].data;
    const Value& x = values_[static_cast<size_t>(operation.x)];
    const Value& y = values_[static_cast<size_t>(operation.y)];
    const int64_t width = widths_[static_cast<size_t>(operation.y)];
    pool.each(1, [&](int64_t, int) {
        for (int64_t b = 0; b < x.batch; ++b) {
            const float* from = x.data + wrapped(b * x.length + last[b], x.rows()) * width;
            std::copy(from, from + width, y.data + b * width);
        }
    });
}

void Program::attention(const Operation& operation, const Call& call, ThreadPool& pool) {
    const Value& x = values_[static_cast<size_t>(operation.x)];
    const Value& y = values_[static_cast<size_t>(operation.y)];
    const int64_t heads = operation.heads, size = operation.head_size, width = heads * size;
    const int64_t batch = x.batch, length = x.length;

    // Without a cache this call's keys and values stand in scratch memory of the same form.
    Cache cache{shared_.data(), Dtype::f32, 1, batch, heads, length, size};
    int64_t layer = 0;
    const int32_t* position = nullptr;
    if (operation.cache != kNone) {
        cache = call.caches[static_cast<size_t>(operation.cache)];
        layer = operation.layer;
        position = call.integers[static_cast<size_t>(operation.position)].data;
    }
    const int64_t number_bytes = cache.dtype == Dtype::f32 ? 4 : cache.dtype == Dtype::i8 ? 1 : 2;
    const auto rows_of = [&](int half, int64_t b, int64_t h) {
        const int64_t head = ((layer * 2 + half) * batch + b) * heads + h;
        return static_cast<char*>(cache.data) + head * cache.context * size * number_bytes;
    };
    const auto store = [&](int64_t b, int64_t h) {
        for (int64_t t = 0; t < length; ++t) {
            const int64_t slot = (position ? position[b] : 0) + t;
            if (slot < 0 || slot >= cache.context) continue;
            for (int half = 0; half < 2; ++half)
                kernels_.store_row(x.data + (b * length + t) * 3 * width + (1 + half) * width + h * size, size,
                                   operation.rounding, half ? operation.v_scale : operation.k_scale, cache.dtype,
                                   rows_of(half, b, h) + slot * size * number_bytes);
        }
    };
    const bool rounds = operation.rounding != Rounding::none;
    const float value_scale = rounds ? operation.v_scale : 1.0f;
    const Attention form{cache.dtype, size, operation.score_scale * (rounds ? operation.k_scale : 1.0f), value_scale};
    const auto seen_by = [&](int64_t b, int64_t t) {
        return std::clamp<int64_t>((position ? position[b] : 0) + t + 1, 0, cache.context);
    };
    const auto attend = [&](int64_t b, int64_t h, int64_t t, int64_t queries, int64_t begin, int64_t end,
                            NextKeys next, Partial* partials, float* own) {
        const float* q[kQueryTile];
        int64_t seen[kQueryTile];
        for (int64_t i = 0; i < queries; ++i) {
            q[i] = x.data + (b * length + t + i) * 3 * width + h * size;
            seen[i] = seen_by(b, t + i);
            std::fill(partials[i].sums, partials[i].sums + size, 0.0f);
            partials[i].total = 0;
            partials[i].largest = -std::numeric_limits<float>::infinity();
        }
        kernels_.attend(form, q, queries, seen, rows_of(0, b, h), rows_of(1, b, h), size, begin,
                        std::min(end, seen[queries - 1]), next, partials, own);
    };

    if (length == 1) {
        // One query a head: its keys are cut into chunks of a fixed size, so that long contexts have work for all
        // threads, and the chunks are put together in their order.
        int64_t most = 0;
        for (int64_t b = 0; b < batch; ++b) most = std::max(most, seen_by(b, 0));
        const int64_t chunks = std::max<int64_t>(divide_up(most, kKeyChunk), 1), floats = size + 2;
        const auto partial_of = [&](int64_t unit) { return shared_.data() + unit * floats; };
        const int64_t units = batch * heads * chunks;
        // What is asked for while a unit is computed: the next one's keys, and the place of its value, unless that unit is
        // another thread's.
        const auto next_keys = [&](int64_t unit, int thread) -> NextKeys {
            const int64_t next = unit + 1, b = next / chunks / heads, h = next / chunks % heads;
            if (next >= pool.end_of_range(units, thread)) return {};
            const int64_t begin = next % chunks * kKeyChunk, end = std::min(begin + kKeyChunk, seen_by(b, 0));
            const int64_t row_bytes = size * number_bytes;
            if (end > begin) __builtin_prefetch(rows_of(1, b, h) + (end - 1) * row_bytes, 1);
            return {rows_of(0, b, h) + begin * row_bytes, end - begin};
        };
        pool.each(units, [&](int64_t unit, int thread) {
            float* own = memory_of(thread);
            float* sums = own + kAttendFloats;
            const int64_t b = unit / chunks / heads, h = unit / chunks % heads, chunk = unit % chunks;
            // The new row is in the last chunk that is seen; whoever comes to it writes it.
            const int64_t last = std::max<int64_t>(divide_up(seen_by(b, 0), kKeyChunk) - 1, 0);
            if (chunk == last) store(b, h);
            Partial partial{chunks == 1 ? sums : partial_of(unit) + 2, 0, 0};
            attend(b, h, 0, 1, chunk * kKeyChunk, (chunk + 1) * kKeyChunk, next_keys(unit, thread), &partial, own);
            if (chunks == 1) {
                kernels_.divide(partial, value_scale, size, y.data + b * width + h * size);
            } else {
                partial_of(unit)[0] = partial.total;
                partial_of(unit)[1] = partial.largest;
            }
        });
        if (chunks == 1) return;
        pool.each(batch * heads, [&](int64_t head, int) {
            Partial first{partial_of(head * chunks) + 2, partial_of(head * chunks)[0], partial_of(head * chunks)[1]};
            for (int64_t chunk = 1; chunk < chunks; ++chunk) {
                float* other = partial_of(head * chunks + chunk);
                kernels_.merge(first, Partial{other + 2, other[0], other[1]}, size);
            }
            kernels_.divide(first, value_scale, size, y.data + head * size);
        });
        return;
    }
    pool.each(batch * heads, [&](int64_t head, int) { store(head / heads, head % heads); });
    if (length >= kManyQueries) {
        const int64_t blocks = divide_up(length, kQueryBlock);
        pool.each(batch * heads * blocks, [&](int64_t unit, int thread) {
            // The last queries see the most keys: they are shared out first.
            const int64_t head = unit % (batch * heads), b = head / heads, h = head % heads;
            const int64_t t = (blocks - 1 - unit / (batch * heads)) * kQueryBlock;
            const int64_t queries = std::min(kQueryBlock, length - t);
            int64_t seen[kQueryBlock];
            for (int64_t i = 0; i < queries; ++i) seen[i] = seen_by(b, t + i);
            kernels_.attend_block(form, x.data + (b * length + t) * 3 * width + h * size, 3 * width, queries, seen,
                                  rows_of(0, b, h), rows_of(1, b, h), y.data + (b * length + t) * width + h * size,
                                  width, memory_of(thread));
        });
        return;
    }
    const int64_t query_tiles = divide_up(length, kQueryTile);
    pool.each(batch * heads * query_tiles, [&](int64_t unit, int thread) {
        float* own = memory_of(thread);
        // The last queries see the most keys: they are shared out first.
        const int64_t head = unit % (batch * heads), b = head / heads, h = head % heads;
        const int64_t t = (query_tiles - 1 - unit / (batch * heads)) * kQueryTile;
        const int64_t queries = std::min(kQueryTile, length - t);
        Partial partials[kQueryTile];
        for (int64_t i = 0; i < kQueryTile; ++i) partials[i].sums = own + kAttendFloats + i * padded(size);
        attend(b, h, t, queries, 0, cache.context, {}, partials, own);
        for (int64_t i = 0; i < queries; ++i)
            kernels_.divide(partials[i], value_scale, size, y.data + (b * length + t + i) * width + h * size);
    });
}

}  // namespace nvtripy_portable

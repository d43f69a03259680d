#include "program.h"

#include <algorithm>

namespace nvtripy_portable {

namespace {

void check_index(const char* what, int64_t index, int64_t length) {
    if (index < -length || index >= length)
        throw IndexError(std::string(what) + " expects indices in [-" + std::to_string(length) + ", " +
                         std::to_string(length) + ") but got " + std::to_string(index));
}

}  // namespace

int64_t padded(int64_t width) { return (width + kInputBlock - 1) / kInputBlock * kInputBlock; }
int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
    int64_t widest = 0, head_size = 0, adapter_width = 0;
    bool has_window = true;
    for (const Operation& operation : operations_) {
        head_size = std::max(head_size, operation.head_size);
        widest = std::max({widest, operation.stage.width, operation.weight.width, operation.head_size});
        if (operation.kind == Kind::low_rank) adapter_width = std::max(adapter_width, operation.stage.width);
        if (operation.kind == Kind::attention) {
            has_window &= operation.window > 0;
            window_ = std::max(window_, operation.window);
        }
        if (operation.kind == Kind::linear)
            few_floats_ = std::max(few_floats_, kernels_.prepared_floats(operation.linear(), Role::generated, kFewGenerated));
    }
    if (!has_window) window_ = 0;
    // A few tokens' prepared inputs; one token's on the way there; and what a kernel works with.
    thread_floats_ = few_floats_ + padded(widest) +
                     std::max({kLinearScratch, attend_block_floats(head_size) + kQueryBlock * (2 * head_size + 2),
                               kRowsOfAdapter * (kMostRank + adapter_width)}) + 64;
}

void Program::run(const std::vector<IntegerInput>& integers, const std::vector<Cache>& caches,
                  const std::vector<Table>& tables, const std::vector<FloatArray>& inputs,
                  const std::vector<FloatArray>& outputs) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Call call{caches, tables, inputs, outputs, &integers};
    begin(call);
    execute(call);
}

void Program::step(const IntegerInput& tokens, const std::vector<Segment>& segments, const IntegerInput& rows,
                   const std::vector<Cache>& caches, const std::vector<Table>& tables, const uint8_t* empty,
                   const FloatArray& output) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t count = tokens.batch * tokens.length;
    positions_.clear();
    bool was_prompt = false;
    for (const Segment& segment : segments) {
        if (segment.row != static_cast<int64_t>(positions_.size()) || segment.count < 0 || segment.position < 0)
            throw std::invalid_argument("expected segments one behind the other");
        if (segment.position + segment.count > segment.capacity)
            throw std::invalid_argument("expected pages for " + std::to_string(segment.position + segment.count) +
                                        " tokens but got room for " + std::to_string(segment.capacity));
        if (was_prompt && segment.role == Role::generated)
            throw std::invalid_argument("expected generated tokens before prompts");
        was_prompt = segment.role == Role::prompt;
        for (int64_t t = 0; t < segment.count; ++t) positions_.push_back(static_cast<int32_t>(segment.position + t));
    }
    if (count != static_cast<int64_t>(positions_.size()))
        throw std::invalid_argument("expected " + std::to_string(positions_.size()) + " tokens but got " + std::to_string(count));
    const std::vector<FloatArray> inputs, outputs = {output};
    Call call{caches, tables, inputs, outputs, nullptr, &tokens, &segments, &rows, empty};
    begin(call);
    execute(call);
}

// Checks everything and gives all values their memory.
void Program::begin(Call& call) {
    if (call.inputs.size() != inputs_.size() || call.outputs.size() != outputs_.size())
        throw std::invalid_argument("expected " + std::to_string(inputs_.size()) + " float inputs and " +
                                    std::to_string(outputs_.size()) + " outputs");
    for (Value& each : values_) each = Value{};
    for (size_t i = 0; i < inputs_.size(); ++i) {
        const FloatArray& input = call.inputs[i];
        value(inputs_[i]) = {input.data, input.batch, input.length, input.length == 1 ? input.batch : 0};
    }
    for (Sequences& each : sequences_) each.batch = -1;  // of an earlier call
    int64_t shared = 0;
    for (const Operation& operation : operations_) plan(call, operation, shared);
    shared_.reserve(shared);
    give_memory(call);
}

void Program::plan(Call& call, const Operation& operation, int64_t& shared) {
    Value& y = value(operation.y);
    if (operation.x != kNone) {
        y = value(operation.x);
        y.data = nullptr;
    }
    switch (operation.kind) {
        case Kind::embedding: {
            const IntegerInput& tokens = call.tokens_of(operation);
            y = {nullptr, tokens.batch, tokens.length, tokens.length == 1 ? tokens.batch : 0};
            int64_t ids = operation.weight.rows;
            if (operation.prompts != kNone) {
                const Table& prompts = call.tables[static_cast<size_t>(operation.prompts)];
                if (prompts.width != operation.weight.width || prompts.slots != 1 || prompts.layers != 1)
                    throw std::invalid_argument("embedding: the rows of prompts do not fit the tokens'");
                ids += prompts.rank;
            }
            for (int64_t i = 0; i < y.rows(); ++i) {
                if (tokens.data[i] >= operation.weight.rows) check_index("gather of token embeddings", tokens.data[i], ids);
                else check_index("gather of token embeddings", tokens.data[i], operation.weight.rows);
            }
            const auto check_positions = [&](int64_t first, int64_t count) {
                if (count == 0 || !operation.positions.data) return;
                check_index("gather of position embeddings", first, operation.positions.rows);
                check_index("gather of position embeddings", first + count - 1, operation.positions.rows);
            };
            if (call.segments) {
                y = {nullptr, 1, tokens.batch * tokens.length, 0};
                for (const Segment& segment : *call.segments) {
                    check_positions(segment.position, segment.count);
                    if (segment.role == Role::generated) y.generated += segment.count;
                }
                break;
            }
            const int32_t* position =
                operation.position == kNone ? nullptr : call.numbers_of(operation.position, "position", y.batch);
            for (int64_t b = 0; b < y.batch; ++b) check_positions(position ? position[b] : 0, y.length);
            break;
        }
        case Kind::last_rows: {
            // What is computed of rows that were picked is a generated token's: there are few, whoever they are.
            if (call.rows) {
                const int64_t count = call.rows->batch * call.rows->length;
                for (int64_t i = 0; i < count; ++i) check_index("gather of last rows", call.rows->data[i], y.rows());
                y = {nullptr, count, 1, count};
                break;
            }
            const int32_t* last = call.numbers_of(operation.last, "last", y.batch);
            for (int64_t b = 0; b < y.batch; ++b) check_index("gather of last rows", b * y.length + last[b], y.rows());
            y = {nullptr, y.batch, 1, y.batch};
            break;
        }
        case Kind::attention: {
            if (operation.cache == kNone) {
                shared = std::max(shared, 2 * y.rows() * operation.groups * operation.head_size);
            } else {
                const Cache& cache = call.caches[static_cast<size_t>(operation.cache)];
                if (cache.heads != operation.groups || cache.head_size != operation.head_size ||
                    operation.layer >= cache.layers || (!cache.is_pool && cache.pages != y.batch))
                    throw std::invalid_argument("attention: the cache does not fit the queries");
            }
            // Partial softmaxes, where keys are cut into chunks. There is a cache then: without one, one token sees itself.
            const Sequences& sequences = sequences_of(call, operation, y);
            if (sequences.has_parts)
                shared = std::max(shared, static_cast<int64_t>(sequences.chunks.size()) * operation.heads * (operation.head_size + 2));
            break;
        }
        case Kind::linear: {
            const Linear linear = operation.linear();
            if (y.generated > kFewGenerated)
                shared = std::max(shared, kernels_.prepared_floats(linear, Role::generated, y.generated));
            if (y.rows() > y.generated)
                shared = std::max(shared, kernels_.prepared_floats(linear, Role::prompt, y.rows() - y.generated));
            break;
        }
        case Kind::low_rank: {
            const Table &down = call.tables[static_cast<size_t>(operation.down)], &up = call.tables[static_cast<size_t>(operation.up)];
            if (down.width != operation.stage.width || up.width != operation.outputs || down.rank != up.rank ||
                down.slots != up.slots || down.dtype != up.dtype || operation.layer >= std::min(down.layers, up.layers) ||
                down.rank > kMostRank)
                throw std::invalid_argument("low_rank: the tables do not fit the input");
            if (call.segments) {
                for (const Segment& segment : *call.segments) check_index("gather of adapters", segment.slot, down.slots);
            } else {
                const int32_t* slots = call.numbers_of(operation.slot, "slot", y.batch);
                for (int64_t b = 0; b < y.batch; ++b) check_index("gather of adapters", slots[b], down.slots);
            }
            break;
        }
        case Kind::plugin: {
            for (const PluginTensor& each : operation.plugin->inputs)
                if (each.is_value() && value(each.value).rows() != y.rows())
                    throw std::invalid_argument(operation.plugin->name + ": expected as many rows of every input");
            for (const PluginTensor& each : operation.plugin->outputs) value(each.value) = {nullptr, y.batch, y.length, y.generated};
            shared = std::max(shared, plugin_floats(*operation.plugin, y.rows()));
            break;
        }
        case Kind::norm:
        case Kind::finish: break;
    }
}

// The sequences that an attention operation is about.
const Sequences& Program::sequences_of(Call& call, const Operation& operation, const Value& value) {
    const Cache* cache = operation.cache == kNone ? nullptr : &call.caches[static_cast<size_t>(operation.cache)];
    const int64_t capacity = cache ? cache->page_tokens : value.length;
    const int key = cache ? operation.position : kNone;
    for (const Sequences& each : sequences_)
        if (each.batch == value.batch && each.window == operation.window && each.frequencies == operation.frequencies &&
            (call.segments || (each.key == key && each.length == value.length && each.capacity == capacity)))
            return each;
    auto free = std::find_if(sequences_.begin(), sequences_.end(), [](const Sequences& each) { return each.batch < 0; });
    Sequences& sequences = free == sequences_.end() ? sequences_.emplace_back() : *free;
    sequences.key = key;
    sequences.window = operation.window;
    sequences.frequencies = operation.frequencies;
    sequences.batch = value.batch;
    sequences.length = value.length;
    sequences.capacity = capacity;
    if (call.segments) {
        sequences.segments = *call.segments;
    } else {
        const int32_t* position = cache ? call.numbers_of(operation.position, "position", value.batch) : nullptr;
        sequences.segments.clear();
        sequences.identity.resize(static_cast<size_t>(value.batch));
        for (int64_t b = 0; b < value.batch; ++b) {
            int32_t& page = sequences.identity[static_cast<size_t>(b)];
            page = static_cast<int32_t>(b);
            sequences.segments.push_back({b * value.length, value.length, position ? position[b] : 0,
                                          value.length == 1 ? Role::generated : Role::prompt, &page, capacity});
        }
    }
    sequences.plan();
    if (operation.frequencies) sequences.find_turns(operation.half);
    return sequences;
}

void Program::give_memory(const Call& call) {
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
        Value& output = value(outputs_[i]);
        if (output.rows() != call.outputs[i].batch * call.outputs[i].length)
            throw std::invalid_argument("output " + std::to_string(i) + " has the wrong shape");
        output.data = call.outputs[i].data;
    }
}

void Program::execute(Call& call) {
    ThreadPool::instance().run([&](ThreadPool& pool) {
        const auto threads = static_cast<size_t>(pool.team());
        if (thread_memory_.size() < threads) thread_memory_.resize(threads);
        for (Memory& memory : thread_memory_) memory.reserve(thread_floats_);
        for (const Operation& operation : operations_) switch (operation.kind) {
                case Kind::norm: norm(operation, pool); break;
                case Kind::linear: linear(operation, pool); break;
                case Kind::low_rank: low_rank(operation, call, pool); break;
                case Kind::embedding: embedding(operation, call, pool); break;
                case Kind::last_rows: last_rows(operation, call, pool); break;
                case Kind::attention: attention(operation, call, pool); break;
                case Kind::plugin: plugin(operation, pool); break;
                case Kind::finish: finish(operation, pool); break;
            }
    });
}

}  // namespace nvtripy_portable

// What a program's operations do with rows, shared out among threads. How they are shared out never shows in what comes out.
#include "program.h"
#include "streaming.h"

namespace nvtripy_portable {

namespace {

// How rows are shared out never changes what comes out: each has its own sum. It hardly changes the speed either: from 8 to
// 128 KB and from 8 to 128 units made 0.98 to 1.07 of it on a busy Zen 3, int4 once 1.13 (124M, 2 threads): noise.
constexpr int64_t kUnitBytes = 32 << 10;  // of weights: the least that is worth sharing out
constexpr int64_t kUnits = 32;            // that a large weight is cut into, at least
constexpr int64_t kUnitsPerThread = 4;    // on many threads

// The index that NumPy would take: negative ones count from the end.
int64_t wrapped(int64_t index, int64_t length) { return index < 0 ? index + length : index; }

void add(float* y, const float* x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) y[i] += x[i];
}

}  // namespace

void Program::norm(const Operation& operation, ThreadPool& pool) {
    const Value &x = value(operation.x), &y = value(operation.y);
    const int64_t width = operation.stage.width;
    pool.each(x.rows(), [&](int64_t row, int) {
        kernels_.norm(x.data + row * width, operation.stage.norm_scale, operation.stage.norm_bias,
                      operation.stage.epsilon, width, y.data + row * width);
    });
}

void Program::linear(const Operation& operation, ThreadPool& pool) {
    const Value& x = value(operation.x);
    if (x.generated > kFewGenerated) multiply_many(operation, Role::generated, 0, x.generated, pool);
    else if (x.generated > 0) multiply_few(operation, pool);
    if (x.rows() > x.generated) multiply_many(operation, Role::prompt, x.generated, x.rows() - x.generated, pool);
}

// A few generated tokens are prepared by every thread for itself: that is sooner done than waited for. Its first weights come
// meanwhile.
void Program::multiply_few(const Operation& operation, ThreadPool& pool) {
    const Linear linear = operation.linear();
    const Matrix& weight = operation.weight;
    const Value &x = value(operation.x), &y = value(operation.y);
    const float* residual = operation.residual == kNone ? nullptr : value(operation.residual).data;
    const float* addend = addend_of(operation, 0);
    const int64_t tokens = x.generated, outputs = weight.rows;
    const int64_t rows = rows_together(weight, pool), units = divide_up(outputs, rows);
    const bool plain = kernels_.prepared_floats(linear, Role::generated, tokens) == 0;
    const auto prepare = [&](int thread) {
        float* own = memory_of(thread);
        const char* first =
            static_cast<const char*>(weight.data) + pool.end_of_range(units, thread - 1) * rows * weight.row_bytes();
        ask_for_first(first);
        if (!plain) kernels_.prepare(linear, Role::generated, x.data, tokens, 0, tokens, own, own + few_floats_);
    };
    pool.each(units, prepare, [&](int64_t unit, int thread) {
        float* own = memory_of(thread);
        const int64_t begin = unit * rows, end = std::min(begin + rows, outputs);
        kernels_.multiply(linear, Role::generated, plain ? x.data : own, tokens, 0, tokens, begin, end, y.data + begin,
                          outputs, own + few_floats_);
        for (int64_t t = 0; t < tokens; ++t) {
            if (addend) add(y.data + t * outputs + begin, addend + t * outputs + begin, end - begin);
            kernels_.finish(y.data + t * outputs + begin, end - begin, operation.bias ? operation.bias + begin : nullptr,
                            operation.activation, residual ? residual + t * outputs + begin : nullptr);
        }
    });
}

// `tokens` tokens from row `from` on: all are prepared first. Generated ones then meet the weight's rows together, prompts'
// meet panels of them, up to kPanelTokens at a time.
void Program::multiply_many(const Operation& operation, Role role, int64_t from, int64_t tokens, ThreadPool& pool) {
    const Linear linear = operation.linear();
    const int64_t outputs = linear.weight.rows;
    const float* x = value(operation.x).data + from * linear.stage.input_width();
    float* y = value(operation.y).data + from * outputs;
    const float* residual =
        operation.residual == kNone ? nullptr : value(operation.residual).data + from * outputs;
    const float* addend = addend_of(operation, from);
    const bool plain = kernels_.prepared_floats(linear, role, tokens) == 0;
    const float* prepared = plain ? x : shared_.data();
    const int64_t group = kernels_.token_group;
    if (!plain) {
        const int64_t together = divide_up(std::min<int64_t>(divide_up(tokens, 8), 4), group) * group;
        pool.each(divide_up(tokens, together), [&](int64_t unit, int thread) {
            kernels_.prepare(linear, role, x, tokens, unit * together, std::min((unit + 1) * together, tokens),
                             shared_.data(), memory_of(thread) + few_floats_);
        });
    }
    const int64_t blocks = role == Role::prompt ? divide_up(tokens, kPanelTokens) : 1;
    const int64_t block = divide_up(divide_up(tokens, blocks), group) * group;
    int64_t rows = role == Role::prompt ? kernels_.prompt_rows : rows_together(linear.weight, pool);
    if (role == Role::prompt)
        while (rows > kPanelColumns && divide_up(outputs, rows) * blocks < 2 * pool.team()) rows /= 2;
    const int64_t units = divide_up(outputs, rows);
    pool.each(units * divide_up(tokens, block), [&](int64_t unit, int thread) {
        const int64_t first = unit / units * block, count = std::min(block, tokens - first);
        const int64_t begin = unit % units * rows, end = std::min(begin + rows, outputs);
        float* to = y + first * outputs + begin;
        kernels_.multiply(linear, role, prepared, tokens, first, count, begin, end, to, outputs,
                          memory_of(thread) + few_floats_);
        for (int64_t t = 0; t < count; ++t) {
            if (addend) add(to + t * outputs, addend + (first + t) * outputs + begin, end - begin);
            kernels_.finish(to + t * outputs, end - begin, operation.bias ? operation.bias + begin : nullptr,
                            operation.activation, residual ? residual + (first + t) * outputs + begin : nullptr);
        }
    });
}

// What is added before the activation, from a row on; nullptr where there is nothing.
const float* Program::addend_of(const Operation& operation, int64_t row) {
    if (operation.addend == kNone || value(operation.addend).is_zero) return nullptr;
    return value(operation.addend).data + row * operation.weight.rows;
}

// Neighbouring rows with the same adapter meet it together; each row's sums are its own.
void Program::low_rank(const Operation& operation, const Call& call, ThreadPool& pool) {
    const Value& x = value(operation.x);
    Value& y = value(operation.y);
    const Table &down = call.tables[static_cast<size_t>(operation.down)], &up = call.tables[static_cast<size_t>(operation.up)];
    together_.clear();
    const auto put = [&](int64_t first, int64_t count, int64_t slot) {
        slot = wrapped(slot, down.slots);
        for (int64_t row = first; row < first + count; ++row) {
            const bool goes_on = !together_.empty() && together_.back().slot == slot &&
                                 together_.back().count < kRowsOfAdapter && together_.back().first + together_.back().count == row;
            if (goes_on) ++together_.back().count;
            else together_.push_back({row, 1, slot});
        }
    };
    if (call.segments) {
        for (const Segment& segment : *call.segments) put(segment.row, segment.count, segment.slot);
    } else {
        const int32_t* slots = (*call.integers)[static_cast<size_t>(operation.slot)].data;
        for (int64_t b = 0; b < x.batch; ++b) put(b * x.length, x.length, slots[b]);
    }
    const auto is_empty = [&](const Together& each) { return call.empty && call.empty[each.slot]; };
    y.is_zero = std::all_of(together_.begin(), together_.end(), is_empty);
    if (y.is_zero) return;
    const InputStage& stage = operation.stage;
    pool.each(static_cast<int64_t>(together_.size()), [&](int64_t unit, int thread) {
        const Together& each = together_[static_cast<size_t>(unit)];
        float* to = y.data + each.first * operation.outputs;
        if (is_empty(each)) {
            std::fill_n(to, each.count * operation.outputs, 0.0f);
            return;
        }
        float *few = memory_of(thread) + few_floats_, *gated = few + kRowsOfAdapter * kMostRank;
        const float* from = x.data + each.first * stage.input_width();
        if (stage.gate != Activation::none) {
            for (int64_t t = 0; t < each.count; ++t)
                kernels_.apply_gate(from + t * stage.input_width(), stage.gate, stage.width, gated + t * stage.width);
            from = gated;
        }
        const LowRank matrices{down.at(each.slot, operation.layer), up.at(each.slot, operation.layer), down.dtype, down.rank,
                               stage.width, operation.outputs};
        kernels_.low_rank(matrices, from, stage.width, each.count, to, few);
    });
}

int64_t Program::rows_together(const Matrix& weight, const ThreadPool& pool) const {
    const int64_t by_bytes = divide_up(kUnitBytes, std::max<int64_t>(weight.row_bytes(), 1));
    const int64_t units = std::max(kUnits, kUnitsPerThread * pool.team());
    return divide_up(std::max(by_bytes, divide_up(weight.rows, units)), kernels_.row_group) * kernels_.row_group;
}

void Program::embedding(const Operation& operation, const Call& call, ThreadPool& pool) {
    const IntegerInput& tokens = call.tokens_of(operation);
    const Value& y = value(operation.y);
    const int64_t width = operation.weight.width;
    Matrix prompts;
    if (operation.prompts != kNone) {
        const Table& table = call.tables[static_cast<size_t>(operation.prompts)];
        prompts = {table.data, table.dtype, table.rank, width, nullptr, 0, 0, false};
    }
    const auto load_part = [&](const Matrix& table, int64_t row, float* to) {
        if (row >= 0 && row < table.rows) kernels_.load_row(table, row, to);
        else std::fill_n(to, width, 0.0f);
    };
    pool.each(y.rows(), [&](int64_t row, int thread) {
        float* own = memory_of(thread);
        const int64_t b = row / y.length, t = row % y.length;
        int64_t position = t;
        if (call.segments) position = positions_[static_cast<size_t>(row)];
        else if (operation.position != kNone) position += (*call.integers)[static_cast<size_t>(operation.position)].data[b];
        float* to = y.data + row * width;
        const int64_t id = tokens.data[row], known = operation.weight.rows;
        if (operation.first_token != kNone) load_part(operation.weight, id - operation.first_token, to);
        else if (id < known) kernels_.load_row(operation.weight, wrapped(id, known), to);
        else kernels_.load_row(prompts, id - known, to);
        if (!operation.positions.data) return;
        if (operation.first_position != kNone) load_part(operation.positions, position - operation.first_position, own);
        else kernels_.load_row(operation.positions, wrapped(position, operation.positions.rows), own);
        for (int64_t i = 0; i < width; ++i) to[i] += own[i];
    });
}

void Program::last_rows(const Operation& operation, const Call& call, ThreadPool& pool) {
    const Value &x = value(operation.x), &y = value(operation.y);
    const int64_t width = widths_[static_cast<size_t>(operation.y)];
    const int32_t* last = call.rows ? call.rows->data : (*call.integers)[static_cast<size_t>(operation.last)].data;
    pool.each(1, [&](int64_t, int) {
        for (int64_t i = 0; i < y.rows(); ++i) {
            const int64_t row = wrapped(call.rows ? last[i] : i * x.length + last[i], x.rows());
            std::copy(x.data + row * width, x.data + (row + 1) * width, y.data + i * width);
        }
    });
}

}  // namespace nvtripy_portable

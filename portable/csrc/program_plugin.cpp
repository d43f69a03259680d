// Plug-ins in the middle of a program, and what follows them.
#include <array>

#include "program.h"

namespace nvtripy_portable {

namespace {

constexpr size_t kMessageBytes = 1024;

static_assert(static_cast<int>(Dtype::f32) == NVTRIPY_PORTABLE_FLOAT32 && static_cast<int>(Dtype::f16) == NVTRIPY_PORTABLE_FLOAT16 &&
              static_cast<int>(Dtype::bf16) == NVTRIPY_PORTABLE_BFLOAT16);

void each_on_the_pool(const NvtripyPortableCall* call, int64_t units, void (*work)(int64_t, void*), void* argument) {
    static_cast<ThreadPool*>(call->runtime)->each(units, [&](int64_t unit, int) { work(unit, argument); });
}

NvtripyPortableField described(const PluginField& field) {
    NvtripyPortableField result{field.name.c_str(), NVTRIPY_PORTABLE_INTEGERS, 0, 0, nullptr};
    if (const auto* integers = std::get_if<std::vector<int64_t>>(&field.values)) {
        result.count = static_cast<int64_t>(integers->size());
        result.values = integers->data();
    } else if (const auto* numbers = std::get_if<std::vector<double>>(&field.values)) {
        result.type = NVTRIPY_PORTABLE_NUMBERS;
        result.count = static_cast<int64_t>(numbers->size());
        result.values = numbers->data();
    } else {
        const auto& text = std::get<std::string>(field.values);
        result.type = NVTRIPY_PORTABLE_TEXT;
        result.count = static_cast<int64_t>(text.size());
        result.values = text.c_str();
    }
    return result;
}

// Floats of scratch memory that `count` numbers of 16 bits take, so that what comes behind them is aligned.
int64_t narrow_floats(int64_t count) { return divide_up(count, 32) * 16; }

}  // namespace

int64_t Program::plugin_floats(const Plugin& plugin, int64_t rows) const {
    int64_t floats = 0;
    for (const auto* tensors : {&plugin.inputs, &plugin.outputs})
        for (const PluginTensor& each : *tensors)
            if (each.is_value() && each.dtype != Dtype::f32)
                floats += narrow_floats(rows * widths_[static_cast<size_t>(each.value)]);
    return floats;
}

// On this thread; the others have nothing to do meanwhile but what the function gives them.
void Program::plugin(const Operation& operation, ThreadPool& pool) {
    const Plugin& plugin = *operation.plugin;
    const Value& like = value(operation.x);
    const int64_t rows = like.rows();
    if (rows == 0 && plugin.has_rows) return;
    std::vector<std::array<int64_t, 3>> shapes(plugin.inputs.size() + plugin.outputs.size());
    std::vector<NvtripyPortableTensor> tensors(shapes.size());
    float* next = shared_.data();
    const auto describe = [&](const PluginTensor& tensor, size_t number) {
        if (!tensor.is_value()) {
            tensors[number] = {const_cast<void*>(tensor.data), tensor.code, static_cast<int32_t>(tensor.shape.size()),
                               tensor.shape.data()};
            return;
        }
        const int64_t width = widths_[static_cast<size_t>(tensor.value)];
        int32_t rank = 2;
        shapes[number] = {rows, width, 0};
        if (!plugin.has_rows && plugin.rank == 3) {
            rank = 3;
            shapes[number] = {like.batch, like.length, width};
        } else if (!plugin.has_rows && plugin.rank == 1) {
            rank = 1;
            shapes[number] = {width, 0, 0};
        }
        void* data = value(tensor.value).data;
        if (tensor.dtype != Dtype::f32) {
            data = next;
            next += narrow_floats(rows * width);
        }
        tensors[number] = {data, static_cast<int32_t>(tensor.dtype), rank, shapes[number].data()};
    };
    for (size_t i = 0; i < plugin.inputs.size(); ++i) {
        const PluginTensor& input = plugin.inputs[i];
        describe(input, i);
        if (!input.is_value()) continue;
        Value& x = value(input.value);
        const int64_t width = widths_[static_cast<size_t>(input.value)];
        if (x.is_zero) std::fill_n(x.data, rows * width, 0.0f);
        x.is_zero = false;
        if (input.dtype == Dtype::f32) continue;
        auto* to = static_cast<uint16_t*>(tensors[i].data);
        pool.each(rows, [&](int64_t row, int) {
            kernels_.store_row(x.data + row * width, width, Rounding::none, 1, input.dtype, to + row * width);
        });
    }
    for (size_t i = 0; i < plugin.outputs.size(); ++i) describe(plugin.outputs[i], plugin.inputs.size() + i);
    std::vector<NvtripyPortableField> fields;
    for (const PluginField& field : plugin.fields) fields.push_back(described(field));

    std::array<char, kMessageBytes> message{};
    const NvtripyPortableCall call{NVTRIPY_PORTABLE_PLUGIN_VERSION,
                                   static_cast<int32_t>(plugin.inputs.size()),
                                   static_cast<int32_t>(plugin.outputs.size()),
                                   static_cast<int32_t>(fields.size()),
                                   tensors.data(),
                                   tensors.data() + plugin.inputs.size(),
                                   fields.data(),
                                   plugin.context,
                                   message.data(),
                                   message.size(),
                                   each_on_the_pool,
                                   &pool};
    const int code = plugin.function(&call);
    message.back() = 0;
    if (code != 0) {
        const std::string text = message[0] ? std::string(message.data()) : "error " + std::to_string(code);
        throw PluginError(plugin.name + ": " + text + plugin.location);
    }
    for (size_t i = 0; i < plugin.outputs.size(); ++i) {
        const PluginTensor& output = plugin.outputs[i];
        if (output.dtype == Dtype::f32) continue;
        const int64_t width = widths_[static_cast<size_t>(output.value)];
        const Matrix narrow{tensors[plugin.inputs.size() + i].data, output.dtype, rows, width, nullptr, 0, 0, false};
        float* y = value(output.value).data;
        pool.each(rows, [&](int64_t row, int) { kernels_.load_row(narrow, row, y + row * width); });
    }
}

void Program::finish(const Operation& operation, ThreadPool& pool) {
    const int64_t width = widths_[static_cast<size_t>(operation.y)];
    const auto rows_of = [&](int number) -> const float* {
        return number == kNone || value(number).is_zero ? nullptr : value(number).data;
    };
    const Value &x = value(operation.x), &y = value(operation.y);
    const float *addend = rows_of(operation.addend), *residual = rows_of(operation.residual);
    pool.each(y.rows(), [&](int64_t row, int) {
        const float* from = x.data + row * width;
        float* to = y.data + row * width;
        if (addend) for (int64_t i = 0; i < width; ++i) to[i] = from[i] + addend[row * width + i];
        else std::copy(from, from + width, to);
        kernels_.finish(to, width, operation.bias, operation.activation, residual ? residual + row * width : nullptr);
    });
}

}  // namespace nvtripy_portable

// Runs the kernels over odd shapes on every instruction set of this CPU, and those that are emulated, or on those that are
// named, on one to three threads, each array in an allocation of its own: what the sanitizers are to look at. Says what differs
// from plain loops; ends with 1 if anything does. The thorough comparison is tests/portable/test_kernels.py.
//
//     check_kernels [INSTRUCTION_SET...]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "isa.h"
#include "program.h"
#include "sampling.h"
#include "tuning.h"

using namespace nvtripy_portable;

namespace {

std::mt19937 random_bits(1);
int failures = 0;

float uniform() { return std::uniform_real_distribution<float>(-1, 1)(random_bits); }

std::vector<float> floats(int64_t count) {
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = uniform();
    return values;
}

// Stored numbers, exactly as many bytes as they need, and what they stand for.
struct Stored {
    std::vector<uint8_t> bytes;
    std::vector<float> numbers;
};

Stored stored(Dtype dtype, int64_t rows, int64_t width) {
    Matrix form;
    form.dtype = dtype;
    form.width = width;
    Stored result{std::vector<uint8_t>(static_cast<size_t>(rows * form.row_bytes())), {}};
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = 0; i < width; ++i) {
            uint8_t* at = result.bytes.data() + row * form.row_bytes();
            const int code = static_cast<int>(random_bits() % 15) - 7;
            switch (dtype) {
                case Dtype::f32: {
                    const float value = static_cast<float>(code);
                    std::memcpy(at + i * 4, &value, 4);
                    break;
                }
                case Dtype::bf16: {
                    const float value = static_cast<float>(code);
                    std::memcpy(at + i * 2, reinterpret_cast<const uint8_t*>(&value) + 2, 2);
                    break;
                }
                case Dtype::f16: {
                    const uint16_t bits = static_cast<uint16_t>((code < 0 ? 0x8000 : 0) | (0x3c00 + 0x40 * std::abs(code)));
                    std::memcpy(at + i * 2, &bits, 2);  // 1 + |code| / 16
                    break;
                }
                case Dtype::i8: at[i] = static_cast<uint8_t>(code); break;
                case Dtype::f8: at[i] = static_cast<uint8_t>((code < 0 ? 0x80 : 0) | (0x38 + std::abs(code))); break;
                case Dtype::i4: at[i / 2] = static_cast<uint8_t>(at[i / 2] | ((code & 15) << (i % 2 * 4))); break;
            }
            const int magnitude = std::abs(code), sign = code < 0 ? -1 : 1;
            float number = static_cast<float>(code);
            if (dtype == Dtype::f16) number = static_cast<float>(sign) * (1 + static_cast<float>(magnitude) / 16);
            if (dtype == Dtype::f8) number = static_cast<float>(sign) * (1 + static_cast<float>(magnitude) / 8);
            result.numbers.push_back(number);
        }
    return result;
}

void expect(const char* what, const char* isa, double got, double wanted, double scale) {
    if (std::fabs(got - wanted) <= 1e-4 * scale + 1e-5) return;
    if (++failures < 20) std::printf("%s on %s: expected %g but got %g\n", what, isa, wanted, got);
}

// With a gate of relu2, so that plain loops say easily what comes of it.
void check_linear(const Kernels& kernels, Dtype dtype, int64_t tokens, int64_t rows, int64_t width, int64_t block,
                  bool takes_integers = false, bool is_gated = false) {
    const int64_t columns = is_gated ? 2 * width : width;
    const Stored weight = stored(dtype, rows, width);
    const int64_t blocks = block ? width / block : 1;
    const std::vector<float> scales = floats(rows * blocks), bias = floats(rows), x = floats(tokens * columns);
    Operation linear;
    linear.x = 0;
    linear.y = 1;
    linear.stage.width = width;
    linear.weight = {weight.bytes.data(), dtype, rows, width, scales.data(), blocks, block, false};
    linear.bias = bias.data();
    linear.takes_integers = takes_integers;
    if (is_gated) linear.stage.gate = Activation::relu2;
    Program program(kernels, {linear}, {kNone, kNone}, {columns, rows}, {0}, {1});
    const auto input = [&](int64_t t, int64_t i) {
        const float first = x[static_cast<size_t>(t * columns + i)];
        if (!is_gated) return double(first);
        return first < 0 ? 0.0 : double(first) * first * x[static_cast<size_t>(t * columns + width + i)];
    };
    std::vector<float> y(static_cast<size_t>(tokens * rows));
    program.run({}, {}, {}, {{const_cast<float*>(x.data()), 1, tokens}}, {{y.data(), 1, tokens}});
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t n = 0; n < rows; ++n) {
            double sum = bias[static_cast<size_t>(n)], size = 1;
            for (int64_t i = 0; i < width; ++i) {
                const double term = double(weight.numbers[static_cast<size_t>(n * width + i)]) *
                                    input(t, i) *
                                    scales[static_cast<size_t>(n * blocks + (block ? i / block : 0))];
                sum += term;
                size += std::fabs(term);
            }
            expect("linear", kernels.name, y[static_cast<size_t>(t * rows + n)], sum, size);
        }
}

// Adapters of three slots, one after the other and beside each other, with a gate or without.
void check_low_rank(const Kernels& kernels, Dtype dtype, int64_t tokens, int64_t rank, int64_t width, bool is_gated) {
    const int64_t columns = is_gated ? 2 * width : width, outputs = 37, slots = 3, layers = 2, layer = 1;
    const Stored down = stored(dtype, slots * layers * rank, width), up = stored(dtype, slots * layers * rank, outputs);
    const std::vector<float> x = floats(2 * tokens * columns);
    const std::vector<int32_t> chosen = {2, 1};
    Operation operation;
    operation.kind = Kind::low_rank;
    operation.x = 0;
    operation.y = 1;
    operation.slot = 0;
    operation.down = 0;
    operation.up = 1;
    operation.layer = layer;
    operation.outputs = outputs;
    operation.stage.width = width;
    if (is_gated) operation.stage.gate = Activation::relu2;
    Program program(kernels, {operation}, {kNone, kNone}, {columns, outputs}, {0}, {1});
    std::vector<float> y(static_cast<size_t>(2 * tokens * outputs));
    const std::vector<Table> tables = {{down.bytes.data(), dtype, slots, layers, rank, width},
                                       {up.bytes.data(), dtype, slots, layers, rank, outputs}};
    program.run({{chosen.data(), 2, 1}}, {}, tables, {{const_cast<float*>(x.data()), 2, tokens}}, {{y.data(), 2, tokens}});
    for (int64_t t = 0; t < 2 * tokens; ++t) {
        const int64_t first = (chosen[static_cast<size_t>(t / tokens)] * layers + layer) * rank;
        for (int64_t n = 0; n < outputs; ++n) {
            double sum = 0, size = 1;
            for (int64_t r = 0; r < rank; ++r)
                for (int64_t i = 0; i < width; ++i) {
                    double input = x[static_cast<size_t>(t * columns + i)];
                    if (is_gated) input = input < 0 ? 0 : input * input * x[static_cast<size_t>(t * columns + width + i)];
                    const double term = input * down.numbers[static_cast<size_t>((first + r) * width + i)] *
                                        up.numbers[static_cast<size_t>((first + r) * outputs + n)];
                    sum += term;
                    size += std::fabs(term);
                }
            expect("low_rank", kernels.name, y[static_cast<size_t>(t * outputs + n)], sum, size);
        }
    }
}

// What is special about a relative's attention.
struct Relative {
    int64_t heads, groups, window, half;
};

void check_attention(const Kernels& kernels, Dtype dtype, int64_t tokens, int64_t context, int64_t size, int32_t first,
                     const Relative& relative = {3, 3, 0, 0}) {
    const auto [heads, groups, window, half] = relative;
    const int64_t batch = 2, width = heads * size, stride = (heads + 2 * groups) * size;
    const std::vector<float> qkv = floats(batch * tokens * stride), frequencies = floats(half);
    std::vector<int32_t> position = {first, 0};
    Operation attention;
    attention.kind = Kind::attention;
    attention.x = 0;
    attention.y = 1;
    attention.position = 0;
    attention.cache = 0;
    attention.heads = heads;
    attention.groups = groups;
    attention.head_size = size;
    attention.window = window;
    attention.frequencies = half ? frequencies.data() : nullptr;
    attention.half = half;
    const int64_t number = dtype == Dtype::f32 ? 4 : dtype == Dtype::i8 ? 1 : 2;
    std::vector<uint8_t> cache(static_cast<size_t>(2 * batch * groups * size * context * number));
    Program program(kernels, {attention}, {kNone, kNone}, {stride, width}, {0}, {1});
    std::vector<float> y(static_cast<size_t>(batch * tokens * width));
    program.run({{position.data(), batch, 1}}, {{cache.data(), dtype, 1, batch, groups, context, size}}, {},
                {{const_cast<float*>(qkv.data()), batch, tokens}}, {{y.data(), batch, tokens}});
    if (dtype != Dtype::f32) return;
    // The second sequence begins: token t sees tokens 0 to t.
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t h = 0; h < heads; ++h) {
            const int64_t key = heads + h / (heads / groups);
            const auto at = [&](int64_t token, int64_t number, int64_t d) {
                const auto stored = [&](int64_t i) {
                    return double(qkv[static_cast<size_t>((tokens + token) * stride + number * size + i)]);
                };
                if (number >= heads + groups || d >= 2 * half) return stored(d);
                const float angle = static_cast<float>(token) * frequencies[static_cast<size_t>(d % half)];
                const double partner = d < half ? -stored(d + half) : stored(d - half);
                return stored(d) * std::cos(double(angle)) + partner * std::sin(double(angle));
            };
            std::vector<double> sums(static_cast<size_t>(size));
            double total = 0;
            for (int64_t j = window ? std::max<int64_t>(t + 1 - window, 0) : 0; j <= std::min(t, context - 1); ++j) {
                double score = 0;
                for (int64_t d = 0; d < size; ++d) score += at(t, h, d) * at(j, key, d);
                total += std::exp(score);
                for (int64_t d = 0; d < size; ++d) sums[static_cast<size_t>(d)] += std::exp(score) * at(j, key + groups, d);
            }
            for (int64_t d = 0; d < size; ++d)
                expect("attention", kernels.name, y[static_cast<size_t>((tokens + t) * width + h * size + d)],
                       sums[static_cast<size_t>(d)] / total, 1);
        }
}

void check_rows(const Kernels& kernels, Dtype dtype, int64_t tokens, int64_t width) {
    const Stored table = stored(dtype, 5, width), positions = stored(Dtype::bf16, tokens + 3, width);
    const Stored prompts = stored(Dtype::f16, 3, width);
    const std::vector<float> scale = floats(width), bias = floats(width);
    std::vector<int32_t> ids(static_cast<size_t>(2 * tokens)), first = {0, 3}, last = {0, -1};
    for (int32_t& id : ids) id = static_cast<int32_t>(random_bits() % 13) - 5;
    Operation embedding, norm, rows;
    embedding.kind = Kind::embedding;
    embedding.y = 0;
    embedding.tokens = 0;
    embedding.position = 1;
    embedding.prompts = 0;
    embedding.weight = {table.bytes.data(), dtype, 5, width, nullptr, 0, 0, false};
    embedding.positions = {positions.bytes.data(), Dtype::bf16, tokens + 3, width, nullptr, 0, 0, false};
    norm.kind = Kind::norm;
    norm.x = 0;
    norm.y = 1;
    norm.stage.width = width;
    norm.stage.norm_scale = scale.data();
    norm.stage.norm_bias = bias.data();
    Operation rms = norm;
    rms.x = 1;
    rms.y = 2;
    rms.stage.norm_bias = nullptr;
    rows.kind = Kind::last_rows;
    rows.x = 2;
    rows.y = 3;
    rows.last = 2;
    Program program(kernels, {embedding, norm, rms, rows}, {0, 1, 0, kNone}, {width, width, width, width}, {}, {3});
    std::vector<float> y(static_cast<size_t>(2 * width));
    const std::vector<Table> tables = {{prompts.bytes.data(), Dtype::f16, 1, 1, 3, width}};
    const auto run = [&] {
        program.run({{ids.data(), 2, tokens}, {first.data(), 2, 1}, {last.data(), 2, 1}}, {}, tables, {}, {{y.data(), 2, 1}});
    };
    const auto refuses = [&](const char* what) {
        try {
            run();
            expect(what, kernels.name, 1, 0, 0);
        } catch (const IndexError&) {
        }
    };
    run();
    const int32_t id = std::exchange(ids[0], 8);
    refuses("an id beyond the prompts' rows");
    ids[0] = id;
    first[1] = 4;
    refuses("a position beyond the table");
}

// All targets run, whatever follows the last vector; int8 is compared.
void check_quantize(const Kernels& kernels, Dtype from, int64_t count) {
    const Stored numbers = stored(from, 1, count);
    const std::vector<float> scales(static_cast<size_t>(count), 0.125f);
    for (const Dtype to : {Dtype::i8, Dtype::i4, Dtype::f8})
        for (const bool per_number : {false, true}) {
            std::vector<uint8_t> codes(static_cast<size_t>(count));
            kernels.quantize(numbers.bytes.data(), from, count, scales.data(), per_number, to, codes.data());
            if (to != Dtype::i8) continue;
            for (size_t i = 0; i < codes.size(); ++i)
                expect("quantize", kernels.name, static_cast<int8_t>(codes[i]), std::nearbyint(numbers.numbers[i] * 8.0), 0);
        }
}

// With a uniform number of 0, the one that is drawn is the first of the largest.
void check_draw(const Kernels& kernels, int64_t count, int64_t k) {
    const std::vector<float> logits = floats(count);
    const int64_t first = std::max_element(logits.begin(), logits.end()) - logits.begin();
    expect("draw", kernels.name, double(draw(kernels, logits.data(), count, 0.0, 0.8, k, 0.9)), double(first), 0);
    const int64_t last = draw(kernels, logits.data(), count, 0.999999, 1e9, k, std::nullopt);
    expect("a draw's rank", kernels.name, double(largest(kernels, logits.data(), count, k).back()), double(last), 0);
    for (const int64_t place : {int64_t{0}, count / 2, count - 1})
        for (const float bad : {NAN, INFINITY}) {
            std::vector<float> spoilt = logits;
            spoilt[static_cast<size_t>(place)] = bad;
            expect("no draw", kernels.name, double(draw(kernels, spoilt.data(), count, 0.5, 0.8, k, 0.9)),
                   double(kNoNumbers), 0);
        }
}

// Every policy by turns, and the same product under each.
void check_streaming(const Kernels& kernels) {
    const std::vector<uint8_t> memory(3 << 16, 0x11);
    std::vector<Streaming> policies;
    for (const char* text : {"t0", "t1:64", "nta:4096", "none"}) {
        policies.push_back(streaming_of(text, "a policy"));
        set_streaming(policies.back());
        check_linear(kernels, Dtype::f16, 1, 13, 515, 0);
        check_linear(kernels, Dtype::i4, 1, 13, 515, 0, true);
    }
    const auto seconds = time_streaming(kernels, policies, 2, {{memory.data(), static_cast<int64_t>(memory.size())}});
    expect("policies timed", kernels.name, double(seconds.size()), 4, 0);
    expect("rounds timed", kernels.name, double(seconds.back().size()), 2, 0);
    expect("the policy before", kernels.name, double(current_streaming().hint == Hint::none), 1, 0);
    set_streaming({});
}

// The first input as it is, and the third times the constant: row by row, shared out among the threads.
int both(const NvtripyPortableCall* call) {
    if (nvtripy_portable_integer(call, "fails")) return 5;
    const auto unit = [](int64_t row, void* argument) {
        const auto* call = static_cast<const NvtripyPortableCall*>(argument);
        const int64_t width = call->inputs[0].shape[1];
        const auto* x = static_cast<const uint16_t*>(call->inputs[0].data) + row * width;
        const auto* by = static_cast<const float*>(call->inputs[1].data);
        const auto* z = static_cast<const float*>(call->inputs[2].data) + row * width;
        for (int64_t i = 0; i < width; ++i) {
            static_cast<uint16_t*>(call->outputs[0].data)[row * width + i] = x[i];
            static_cast<float*>(call->outputs[1].data)[row * width + i] = z[i] * by[i];
        }
    };
    call->each(call, call->inputs[0].shape[0], unit, const_cast<NvtripyPortableCall*>(call));
    return 0;
}

// A plug-in of float16 and float32, and what follows it.
void check_plugin(const Kernels& kernels, int64_t tokens, int64_t width) {
    const std::vector<float> by = floats(width), bias = floats(width);
    std::vector<float> x(static_cast<size_t>(tokens * width)), y(x.size()), z(x.size());
    for (float& each : x) each = static_cast<float>(random_bits() % 64) / 8;  // which float16 holds
    auto plugin = std::make_shared<Plugin>();
    plugin->name = "both";
    plugin->function = both;
    plugin->has_rows = true;
    plugin->inputs = {{0, Dtype::f16, nullptr, 0, {}}, {kNone, Dtype::f32, by.data(), 0, {width}}, {0, Dtype::f32, nullptr, 0, {}}};
    plugin->outputs = {{1, Dtype::f16, nullptr, 0, {}}, {2, Dtype::f32, nullptr, 0, {}}};
    Operation called, finish;
    called.kind = Kind::plugin;
    called.x = 0;
    called.y = 1;
    called.plugin = plugin;
    finish.kind = Kind::finish;
    finish.x = 1;
    finish.y = 3;
    finish.bias = bias.data();
    finish.addend = 0;
    finish.residual = 2;
    finish.activation = Activation::relu;
    Program program(kernels, {called, finish}, {kNone, 0, kNone, kNone}, {width, width, width, width}, {0}, {3, 2});
    const auto run = [&] {
        program.run({}, {}, {}, {{x.data(), tokens, 1}}, {{y.data(), tokens, 1}, {z.data(), tokens, 1}});
    };
    run();
    for (size_t i = 0; i < x.size(); ++i) {
        const size_t column = i % static_cast<size_t>(width);
        expect("plug-in", kernels.name, z[i], double{x[i]} * by[column], 1);
        expect("finish", kernels.name, y[i], std::max(2.0 * x[i] + bias[column], 0.0) + double{x[i]} * by[column], 1);
    }
    plugin->fields = {{"fails", std::vector<int64_t>{1}}};
    try {
        run();
        expect("a plug-in that fails", kernels.name, 1, 0, 0);
    } catch (const PluginError& error) {
        if (std::string(error.what()) != "both: error 5") expect("a plug-in's error", kernels.name, 1, 0, 0);
    }
}

}  // namespace

int main(int count, char** arguments) {
    const std::vector<std::string> named(arguments + 1, arguments + count);
    std::printf("this processor has");
    for (const std::string& name : available_isas()) std::printf(" %s", name.c_str());
    std::printf("\n");
    for (const std::string& name : named.empty() ? testable_isas() : named) {
        const Kernels& kernels = kernels_for(name);
        for (const int threads : {1, 3}) {
            ThreadPool::instance().set_threads(threads);
            check_streaming(kernels);
            for (const int64_t tokens : {1, 7})
                for (const int64_t width : {1, 31, 130}) check_plugin(kernels, tokens, width);
            for (const Dtype from : {Dtype::f32, Dtype::f16, Dtype::bf16})
                for (const int64_t count : {1, 15, 64, 131}) check_quantize(kernels, from, count);
            for (const int64_t count : {1, 127, 128, 129, 1000})
                for (const int64_t k : {1, 5, 2000}) check_draw(kernels, count, k);
            for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16, Dtype::i8, Dtype::i4, Dtype::f8}) {
                for (const int64_t tokens : {1, 3, 4, 5, 9}) {
                    for (const int64_t width : {1, 31, 515}) check_linear(kernels, dtype, tokens, 13, width, 0);
                    for (const int64_t block : {6, 48, 96, 128}) check_linear(kernels, dtype, tokens, 5, block * 3, block);
                    if (dtype == Dtype::i8 || dtype == Dtype::i4) {
                        for (const int64_t width : {1, 31, 127, 515})
                            check_linear(kernels, dtype, tokens, 13, width, 0, true);
                        for (const int64_t block : {32, 64, 96, 128, 256})
                            check_linear(kernels, dtype, tokens, 5, block * 3, block, true);
                    }
                    check_linear(kernels, dtype, tokens * 33, 67, 130, 0, true);
                    for (const int64_t width : {1, 31, 515}) check_linear(kernels, dtype, tokens, 13, width, 0, width > 1, true);
                    check_rows(kernels, dtype, tokens, 33);
                }
                if (dtype == Dtype::i4 || dtype == Dtype::f8) continue;
                if (dtype == Dtype::f32 || dtype == Dtype::f16)
                    for (const int64_t tokens : {1, 2, 3, 9})
                        for (const int64_t width : {1, 31, 130}) check_low_rank(kernels, dtype, tokens, width % 7, width, tokens % 2);
                for (const int64_t size : {3, 16, 40})
                    for (const int64_t tokens : {1, 2, 7, 50}) {
                        check_attention(kernels, dtype, tokens, 300, size, 290);
                        check_attention(kernels, dtype, tokens, 5, size, -1);
                        check_attention(kernels, dtype, tokens, 300, size, 290, {4, 1, 0, 1});
                        check_attention(kernels, dtype, tokens, 300, size, 290, {6, 2, 5, 0});
                        check_attention(kernels, dtype, tokens, 80, size, 30, {2, 2, 33, size / 2});
                    }
            }
        }
        std::printf("%s: %s\n", name.c_str(), failures ? "failed" : "passed");
    }
    return failures ? 1 : 0;
}

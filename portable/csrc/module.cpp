// The Python module nvtripy_portable._native. Arrays come as buffers of bytes: the lowering knows what is in them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <optional>
#include <span>
#include <tuple>

#include "cache_rows.h"
#include "isa.h"
#include "program.h"
#include "sampling.h"
#include "tuning.h"

namespace nb = nanobind;
using namespace nvtripy_portable;

namespace {

// A view of an array's memory, for as long as this lives.
class Buffer {
public:
    explicit Buffer(nb::handle object, bool writable = false) {
        const int flags = PyBUF_C_CONTIGUOUS | (writable ? PyBUF_WRITABLE : 0);
        if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) throw nb::python_error();
    }
    Buffer(Buffer&& other) noexcept : view_(other.view_) { other.view_.obj = nullptr; }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { PyBuffer_Release(&view_); }

    template <class T>
    T* as() const { return static_cast<T*>(view_.buf); }
    int64_t bytes() const { return view_.len; }
    int dimensions() const { return view_.ndim; }
    int64_t size(int i) const { return view_.shape[i]; }

    // The leading dimensions, of which there may be none: (batch, length).
    std::pair<int64_t, int64_t> rows() const {
        if (view_.ndim < 2) return {1, 1};
        int64_t batch = 1;
        const int leading = view_.ndim - 1;
        for (int i = 0; i < std::max(leading - 1, 1); ++i) batch *= view_.shape[i];
        return {batch, leading > 1 ? view_.shape[leading - 1] : 1};
    }

private:
    Py_buffer view_{};
};

template <class T>
T look_up(const std::map<std::string, T>& table, const std::string& name, const char* what) {
    const auto found = table.find(name);
    if (found == table.end()) throw nb::value_error(("unknown " + std::string(what) + " " + name).c_str());
    return found->second;
}

const std::map<std::string, Kind> kKinds = {{"norm", Kind::norm},
                                            {"linear", Kind::linear},
                                            {"low_rank", Kind::low_rank},
                                            {"embedding", Kind::embedding},
                                            {"last_rows", Kind::last_rows},
                                            {"attention", Kind::attention},
                                            {"plugin", Kind::plugin},
                                            {"finish", Kind::finish}};
const std::map<std::string, Dtype> kDtypes = {{"f32", Dtype::f32}, {"f16", Dtype::f16}, {"bf16", Dtype::bf16},
                                              {"i8", Dtype::i8},   {"i4", Dtype::i4},   {"f8e4m3fn", Dtype::f8}};
const std::map<std::string, Activation> kActivations = {{"gelu_tanh", Activation::gelu_tanh},
                                                        {"gelu_erf", Activation::gelu_erf},
                                                        {"relu", Activation::relu},
                                                        {"relu2", Activation::relu2},
                                                        {"silu", Activation::silu}};
const std::map<std::string, Rounding> kRoundings = {{"i8", Rounding::i8}, {"f8e4m3fn", Rounding::f8}};

bool holds_nan(const uint8_t* numbers, int64_t count) {
    uint8_t largest = 0;
    for (int64_t i = 0; i < count; ++i) largest = std::max<uint8_t>(largest, numbers[i] & 0x7f);
    return largest == 0x7f;
}

// A Program and the arrays that it points into.
class PythonProgram {
public:
    PythonProgram(const std::string& isa, nb::list operations, nb::list caches, nb::list tables, std::vector<int> buffers,
                  std::vector<int64_t> widths, std::vector<int> inputs, std::vector<int> outputs) {
        std::vector<Operation> parsed;
        for (nb::handle each : operations) parsed.push_back(parse(nb::cast<nb::dict>(each)));
        for (nb::handle each : caches) {
            const auto description = nb::cast<nb::tuple>(each);
            const auto shape = nb::cast<std::vector<int64_t>>(description[1]);
            if (shape.size() != 6 || shape[1] != 2) throw nb::value_error("expected a cache of shape (L, 2, B, H, C, D)");
            caches_.push_back({nullptr, look_up(kDtypes, nb::cast<std::string>(description[0]), "dtype"), shape[0],
                               shape[2], shape[3], shape[4], shape[5]});
        }
        for (nb::handle each : tables) {
            const auto description = nb::cast<nb::tuple>(each);
            const auto shape = nb::cast<std::vector<int64_t>>(description[1]);
            if (shape.size() != 4) throw nb::value_error("expected a table of shape (slots, layers, rank, width)");
            tables_.push_back({nullptr, look_up(kDtypes, nb::cast<std::string>(description[0]), "dtype"), shape[0], shape[1],
                               shape[2], shape[3]});
        }
        program_.emplace(kernels_for(isa), std::move(parsed), std::move(buffers), std::move(widths), std::move(inputs),
                         std::move(outputs));
    }

    void run(nb::list integers, nb::list caches, nb::list tables, nb::list inputs, nb::list outputs) {
        std::vector<Buffer> held;
        held.reserve(integers.size() + caches.size() + tables.size() + inputs.size() + outputs.size());
        std::vector<IntegerInput> numbers;
        for (nb::handle each : integers) {
            const Buffer& buffer = held.emplace_back(each);
            numbers.push_back({buffer.as<const int32_t>(), buffer.dimensions() > 0 ? buffer.size(0) : 1,
                               buffer.dimensions() > 1 ? buffer.size(1) : 1});
        }
        std::vector<Cache> stores = caches_;
        if (caches.size() != stores.size()) throw nb::value_error("wrong number of caches");
        for (size_t i = 0; i < stores.size(); ++i) {
            const Buffer& buffer = held.emplace_back(caches[i], true);
            Cache& cache = stores[i];
            cache.data = buffer.as<void>();
            if (buffer.bytes() != cache.bytes()) throw nb::value_error("a cache has the wrong size");
        }
        const std::vector<Table> chosen = filled(tables, held);
        const auto floats = [&](nb::list arrays, bool writable) {
            std::vector<FloatArray> result;
            for (nb::handle each : arrays) {
                const Buffer& buffer = held.emplace_back(each, writable);
                const auto [batch, length] = buffer.rows();
                result.push_back({buffer.as<float>(), batch, length});
            }
            return result;
        };
        const std::vector<FloatArray> in = floats(inputs, false), out = floats(outputs, true);
        const nb::gil_scoped_release released;
        program_->run(numbers, stores, chosen, in, out);
    }

    // Segments (S, 4): how many tokens, the position of the first, whether they are a prompt's, and their adapter's slot; tables
    // (S, pages). `adapters` are the tables of the graph, and `empty` says of each slot whether it holds nothing but zeros.
    void step(nb::handle tokens, nb::handle segments, nb::handle tables, nb::handle rows, nb::handle pool,
              int64_t page_tokens, nb::list adapters, nb::handle empty, nb::handle output) {
        const Buffer ids(tokens), forms(segments), table(tables), wanted(rows), numbers(pool, true), logits(output, true);
        std::vector<Buffer> held_tables;
        held_tables.reserve(adapters.size());
        const std::vector<Table> chosen = filled(adapters, held_tables);
        const Buffer zeros(empty);
        for (const Table& each : chosen)
            if (each.slots > 1 && zeros.bytes() != each.slots) throw nb::value_error("expected a byte for each slot");
        if (caches_.size() != 1) throw nb::value_error("expected a model with one cache");
        std::vector<Cache> stores = caches_;
        Cache& cache = stores[0];
        cache.data = numbers.as<void>();
        cache.is_pool = true;
        cache.page_tokens = page_tokens;
        cache.pages = 1;
        if (page_tokens < 1 || numbers.bytes() % cache.bytes() != 0) throw nb::value_error("the pool has the wrong size");
        cache.pages = numbers.bytes() / cache.bytes();
        const int64_t count = forms.bytes() / 16, widest = count ? table.bytes() / 4 / count : 0;
        if (table.bytes() != count * widest * 4) throw nb::value_error("expected a table for each segment");
        std::vector<Segment> all;
        int64_t row = 0;
        for (int64_t s = 0; s < count; ++s) {
            const int32_t *form = forms.as<const int32_t>() + s * 4, *pages = table.as<const int32_t>() + s * widest;
            const int64_t needed = (static_cast<int64_t>(form[1]) + form[0] + page_tokens - 1) / page_tokens;
            // Pages before what the first token sees may have been given back.
            const int64_t first = program_->first_seen(form[1]) / page_tokens;
            int64_t held = std::min(first, widest);
            while (held < std::min(needed, widest) && pages[held] >= 0 && pages[held] < cache.pages) ++held;
            all.push_back({row, form[0], form[1], form[2] ? Role::prompt : Role::generated, pages, held * page_tokens, form[3]});
            row += form[0];
        }
        const IntegerInput in{ids.as<const int32_t>(), 1, ids.bytes() / 4}, which{wanted.as<const int32_t>(), 1, wanted.bytes() / 4};
        const auto [batch, length] = logits.rows();
        const FloatArray out{logits.as<float>(), batch, length};
        const nb::gil_scoped_release released;
        program_->step(in, all, which, stores, chosen, chosen.empty() ? nullptr : zeros.as<const uint8_t>(), out);
    }

    std::string isa() const { return program_->isa(); }

private:
    // The tables that the graph has, with the arrays of a call.
    std::vector<Table> filled(nb::list arrays, std::vector<Buffer>& held) const {
        std::vector<Table> result = tables_;
        if (arrays.size() != result.size()) throw nb::value_error("wrong number of tables");
        for (size_t i = 0; i < result.size(); ++i) {
            const Buffer& buffer = held.emplace_back(arrays[i]);
            result[i].data = buffer.as<const void>();
            if (buffer.bytes() != result[i].bytes()) throw nb::value_error("a table has the wrong size");
        }
        return result;
    }

    template <class T>
    const T* array(nb::handle object) {
        if (object.is_none()) return nullptr;
        return arrays_.emplace_back(object).as<const T>();
    }

    Matrix matrix(nb::handle object) {
        if (object.is_none()) return {};
        const auto form = nb::cast<nb::dict>(object);
        Matrix result;
        result.dtype = look_up(kDtypes, nb::cast<std::string>(form["dtype"]), "dtype");
        result.rows = nb::cast<int64_t>(form["rows"]);
        result.width = nb::cast<int64_t>(form["width"]);
        result.data = array<void>(form["data"]);
        if (arrays_.back().bytes() != result.rows * result.row_bytes()) throw nb::value_error("a weight has the wrong size");
        result.scales = array<float>(form["scales"]);
        result.scale_stride = nb::cast<int64_t>(form["scale_stride"]);
        result.block = nb::cast<int64_t>(form["block"]);
        if (result.dtype == Dtype::f8) result.has_nan = holds_nan(static_cast<const uint8_t*>(result.data), result.rows * result.width);
        return result;
    }

    Operation parse(const nb::dict& form) {
        Operation operation;
        const auto has = [&](const char* key) { return form.contains(key) && !form[key].is_none(); };
        const auto number = [&](const char* key, auto& to) {
            if (has(key)) to = nb::cast<std::remove_reference_t<decltype(to)>>(form[key]);
        };
        operation.kind = look_up(kKinds, nb::cast<std::string>(form["kind"]), "operation");
        number("x", operation.x);
        number("y", operation.y);
        number("residual", operation.residual);
        number("addend", operation.addend);
        number("slot", operation.slot);
        number("down", operation.down);
        number("up", operation.up);
        number("outputs", operation.outputs);
        number("tokens", operation.tokens);
        number("prompts", operation.prompts);
        number("position", operation.position);
        number("last", operation.last);
        number("cache", operation.cache);
        number("heads", operation.heads);
        number("groups", operation.groups);
        number("head_size", operation.head_size);
        number("window", operation.window);
        number("half", operation.half);
        number("score_scale", operation.score_scale);
        number("layer", operation.layer);
        number("k_scale", operation.k_scale);
        number("v_scale", operation.v_scale);
        number("width", operation.stage.width);
        number("epsilon", operation.stage.epsilon);
        number("input_scale", operation.stage.input_scale);
        number("per_token", operation.stage.per_token);
        number("takes_integers", operation.takes_integers);
        if (has("norm_scale")) operation.stage.norm_scale = array<float>(form["norm_scale"]);
        if (has("norm_bias")) operation.stage.norm_bias = array<float>(form["norm_bias"]);
        if (has("gate")) operation.stage.gate = look_up(kActivations, nb::cast<std::string>(form["gate"]), "activation");
        if (has("frequencies")) operation.frequencies = array<float>(form["frequencies"]);
        if (has("pre_scale")) operation.stage.pre_scale = array<float>(form["pre_scale"]);
        if (has("bias")) operation.bias = array<float>(form["bias"]);
        if (has("input_rounding")) operation.stage.rounding = look_up(kRoundings, nb::cast<std::string>(form["input_rounding"]), "rounding");
        if (has("rounding")) operation.rounding = look_up(kRoundings, nb::cast<std::string>(form["rounding"]), "rounding");
        if (has("activation")) operation.activation = look_up(kActivations, nb::cast<std::string>(form["activation"]), "activation");
        if (has("weight")) operation.weight = matrix(form["weight"]);
        if (has("positions")) operation.positions = matrix(form["positions"]);
        if (has("plugin")) operation.plugin = std::make_shared<Plugin>(plugin(nb::cast<nb::dict>(form["plugin"])));
        return operation;
    }

    Plugin plugin(const nb::dict& form) {
        Plugin result;
        result.name = nb::cast<std::string>(form["name"]);
        result.location = nb::cast<std::string>(form["location"]);
        result.function = reinterpret_cast<NvtripyPortableFunction>(nb::cast<uintptr_t>(form["function"]));
        result.context = reinterpret_cast<void*>(nb::cast<uintptr_t>(form["context"]));
        result.has_rows = nb::cast<bool>(form["has_rows"]);
        result.rank = nb::cast<int>(form["rank"]);
        const auto tensors = [&](const char* key, std::vector<PluginTensor>& to) {
            for (nb::handle each : nb::cast<nb::list>(form[key])) {
                const auto given = nb::cast<nb::dict>(each);
                PluginTensor& tensor = to.emplace_back();
                if (given.contains("value")) {
                    tensor.value = nb::cast<int>(given["value"]);
                    tensor.dtype = look_up(kDtypes, nb::cast<std::string>(given["dtype"]), "dtype");
                } else {
                    tensor.data = array<void>(given["data"]);
                    tensor.code = nb::cast<int32_t>(given["code"]);
                    tensor.shape = nb::cast<std::vector<int64_t>>(given["shape"]);
                }
            }
        };
        tensors("inputs", result.inputs);
        tensors("outputs", result.outputs);
        for (nb::handle each : nb::cast<nb::list>(form["fields"])) {
            const auto given = nb::cast<nb::tuple>(each);
            PluginField& field = result.fields.emplace_back();
            field.name = nb::cast<std::string>(given[0]);
            switch (nb::cast<int>(given[1])) {
                case NVTRIPY_PORTABLE_INTEGERS: field.values = nb::cast<std::vector<int64_t>>(given[2]); break;
                case NVTRIPY_PORTABLE_NUMBERS: field.values = nb::cast<std::vector<double>>(given[2]); break;
                default: {
                    const auto text = nb::cast<nb::bytes>(given[2]);
                    field.values = std::string(text.c_str(), text.size());
                }
            }
        }
        return result;
    }

    std::vector<Buffer> arrays_;
    std::vector<Cache> caches_;
    std::vector<Table> tables_;
    std::optional<Program> program_;
};

int64_t draw_one(nb::handle array, double uniform, double temperature, int64_t k, std::optional<double> top_p,
                 std::optional<double> min_p) {
    const Buffer logits(array);
    const int64_t count = logits.bytes() / 4;
    if (count < 1 || k < 1) throw nb::value_error("expected at least one logit, and one to draw from");
    const nb::gil_scoped_release released;
    return draw(kernels_for(""), logits.as<const float>(), count, uniform, temperature, k, top_p, min_p);
}

// The numbers of a buffer of one type, as ids of `count` tokens where it holds int32.
std::span<const int32_t> ids_of(const Buffer& array, int64_t count) {
    const std::span ids(array.as<const int32_t>(), static_cast<size_t>(array.bytes() / 4));
    if (std::any_of(ids.begin(), ids.end(), [count](int32_t id) { return id < 0 || id >= count; }))
        throw nb::value_error("expected token ids of the vocabulary");
    return ids;
}

void adjust_logits(nb::handle array, nb::handle to, nb::handle biased, nb::handle bias, nb::handle seen, nb::handle counts,
                   std::tuple<double, double, double> penalties, nb::handle allowed, nb::handle forbidden) {
    const Buffer logits(array), out(to, true), biased_ids(biased), by(bias), seen_ids(seen), times(counts), only(allowed),
        never(forbidden);
    const int64_t count = logits.bytes() / 4;
    const std::span amounts(by.as<const double>(), static_cast<size_t>(by.bytes() / 8));
    const std::span often(times.as<const int32_t>(), static_cast<size_t>(times.bytes() / 4));
    Adjustment how;
    how.biased = ids_of(biased_ids, count);
    how.bias = amounts;
    how.seen = ids_of(seen_ids, count);
    how.counts = often;
    std::tie(how.repetition, how.frequency, how.presence) = penalties;
    how.allowed = ids_of(only, count);
    how.forbidden = ids_of(never, count);
    if (out.bytes() != logits.bytes() || how.biased.size() != amounts.size() || how.seen.size() != often.size())
        throw nb::value_error("expected as many numbers as token ids");
    const nb::gil_scoped_release released;
    adjust(logits.as<const float>(), count, how, out.as<float>());
}

// Fills `to` with the codes of `from`, (rows, width), on all threads. Every `rows_per_scale` rows come to the next scale, or
// to the next `width` of them if there is one for each number, and behind the last to the first again.
void quantize(const std::string& isa, nb::handle to, nb::handle from, const std::string& from_dtype, nb::handle scale,
              const std::string& dtype, int64_t width, int64_t rows_per_scale, bool per_number) {
    const Buffer codes(to, true), numbers(from), scales(scale);
    const Dtype in = look_up(kDtypes, from_dtype, "dtype"), out = look_up(kDtypes, dtype, "dtype");
    const int64_t count = codes.bytes(), number = in == Dtype::f32 ? 4 : 2;
    const int64_t scale_rows = scales.bytes() / 4 / (per_number ? width : 1);
    if (width < 1 || count % width || numbers.bytes() != count * number || rows_per_scale < 1 || scale_rows < 1)
        throw nb::value_error("expected as many codes as numbers, and a scale");
    const Kernels& kernels = kernels_for(isa);
    const int64_t rows = count / width, together = std::max<int64_t>((64 << 10) / width, 1);
    const nb::gil_scoped_release released;
    ThreadPool::instance().run([&](ThreadPool& pool) {
        pool.each((rows + together - 1) / together, [&](int64_t unit, int) {
            for (int64_t row = unit * together; row < std::min((unit + 1) * together, rows); ++row)
                kernels.quantize(numbers.as<const char>() + row * width * number, in, width,
                                 scales.as<const float>() + row / rows_per_scale % scale_rows * (per_number ? width : 1),
                                 per_number, out, codes.as<uint8_t>() + row * width);
        });
    });
}

// Reads an array of float32 on all threads, in units as large as a weight's.
float read_all(const std::string& isa, nb::handle array) {
    const Buffer buffer(array);
    const float* x = buffer.as<const float>();
    const int64_t count = buffer.bytes() / 4;
    const Kernels& kernels = kernels_for(isa);
    const nb::gil_scoped_release released;
    constexpr int64_t kUnit = 256 << 10;
    std::atomic<float> total{0};
    ThreadPool::instance().run([&](ThreadPool& pool) {
        pool.each((count + kUnit - 1) / kUnit, [&](int64_t unit, int) {
            total.store(kernels.read(x + unit * kUnit, std::min(kUnit, count - unit * kUnit)), std::memory_order_relaxed);
        });
    });
    return total.load();
}

}  // namespace

NB_MODULE(_native, module) {
    nb::register_exception_translator([](const std::exception_ptr& pointer, void*) {
        try {
            std::rethrow_exception(pointer);
        } catch (const nvtripy_portable::IndexError& error) {
            PyErr_SetString(PyExc_IndexError, error.what());
        }
    });
    nb::exception<PluginError>(module, "PluginError", PyExc_RuntimeError);
    nb::class_<PythonProgram>(module, "Program", "A graph of fused operations with its constants, ready to run.")
        .def(nb::init<const std::string&, nb::list, nb::list, nb::list, std::vector<int>, std::vector<int64_t>,
                      std::vector<int>, std::vector<int>>(),
             nb::arg("isa"), nb::arg("operations"), nb::arg("caches"), nb::arg("tables"), nb::arg("buffers"),
             nb::arg("widths"), nb::arg("inputs"), nb::arg("outputs"))
        .def("run", &PythonProgram::run, nb::arg("integers"), nb::arg("caches"), nb::arg("tables"), nb::arg("inputs"),
             nb::arg("outputs"),
             "Fills the outputs and writes into the caches, without the GIL.")
        .def("step", &PythonProgram::step, nb::arg("tokens"), nb::arg("segments"), nb::arg("tables"), nb::arg("rows"),
             nb::arg("pool"), nb::arg("page_tokens"), nb::arg("adapters"), nb::arg("empty"), nb::arg("output"),
             "Goes on with any mix of sequences, whose keys and values lie in pages of a pool, without the GIL.")
        .def_prop_ro("isa", &PythonProgram::isa);
    module.def("available_isas", &available_isas, "Instruction sets that this CPU has, the best first.");
    module.def("testable_isas", &testable_isas, "The same, and those that plain code stands in for.");
    module.def("kernels_for", [](const std::string& isa) { return std::string(kernels_for(isa).name); }, nb::arg("isa"));
    module.def("threads", [] { return ThreadPool::instance().threads(); });
    module.def("set_threads", [](int threads) { ThreadPool::instance().set_threads(threads); }, nb::arg("threads"));
    module.def("copy_nonzero", [](nb::handle to, nb::handle from) {
        const Buffer target(to, true), source(from);
        if (target.bytes() != source.bytes()) throw nb::value_error("expected arrays of one size");
        const nb::gil_scoped_release released;
        copy_nonzero(target.as<char>(), source.as<const char>(), static_cast<size_t>(source.bytes()));
    }, nb::arg("to"), nb::arg("from_"), "Copies into an array that is all zero, leaving out pages that are zero.");
    module.def("exchange_rows", [](nb::handle cache, nb::handle saved, nb::handle position, int64_t length, bool restore) {
        const Buffer all(cache, true), rows(saved, true), at(position);
        if (all.dimensions() != 6) throw nb::value_error("expected a cache of shape (L, 2, B, H, C, D)");
        const int64_t halves = all.size(0) * 2, batch = all.size(2), heads = all.size(3), context = all.size(4);
        const int64_t count = halves * batch * heads * context;
        const int64_t row_bytes = count ? all.bytes() / count : 0;
        if (rows.bytes() != halves * batch * heads * length * row_bytes || at.bytes() != batch * 4)
            throw nb::value_error("saved rows or positions do not fit the cache");
        exchange_rows(all.as<char>(), rows.as<char>(), at.as<const int32_t>(), halves, batch, heads, context, row_bytes,
                      length, restore);
    }, nb::arg("cache"), nb::arg("saved"), nb::arg("position"), nb::arg("length"), nb::arg("restore"));
    module.def("draw", &draw_one, nb::arg("logits"), nb::arg("uniform"), nb::arg("temperature"), nb::arg("k"),
               nb::arg("top_p") = nb::none(), nb::arg("min_p") = nb::none());
    module.def("adjust", &adjust_logits, nb::arg("logits"), nb::arg("out"), nb::arg("biased"), nb::arg("bias"),
               nb::arg("seen"), nb::arg("counts"), nb::arg("penalties"), nb::arg("allowed"), nb::arg("forbidden"));
    module.def("largest", [](nb::handle array, int64_t k) {
        const Buffer logits(array);
        return largest(kernels_for(""), logits.as<const float>(), logits.bytes() / 4, k);
    }, nb::arg("logits"), nb::arg("k"));
    module.def("log_sum_exp", [](nb::handle array) {
        const Buffer logits(array);
        if (logits.bytes() < 4) throw nb::value_error("expected at least one logit");
        const nb::gil_scoped_release released;
        return log_sum_exp(logits.as<const float>(), logits.bytes() / 4);
    }, nb::arg("logits"));
    module.def("quantize", &quantize, nb::arg("isa"), nb::arg("to"), nb::arg("from_"), nb::arg("from_dtype"),
               nb::arg("scale"), nb::arg("dtype"), nb::arg("width"), nb::arg("rows_per_scale"), nb::arg("per_number"));
    module.def("processor", [] {
        const Processor processor = this_processor();
        return nb::make_tuple(processor.vendor, processor.family, processor.model, processor.name);
    });
    module.def("streaming", [] {
        const nb::gil_scoped_release released;
        return text_of(current_streaming());
    }, "How weights are asked for: set_streaming's policy.");
    module.def("set_streaming", [](const std::string& policy, const std::string& asker) {
        const Streaming parsed = streaming_of(policy, asker.c_str());
        const nb::gil_scoped_release released;
        set_streaming(parsed);
    }, nb::arg("policy"), nb::arg("asker") = "a policy",
               "How weights are asked for from now on: t0, t1 or nta, with the bytes ahead after a colon, or none.");
    module.def("time_streaming", [](const std::string& isa, const std::vector<std::string>& policies, int rounds,
                                    nb::list arrays) {
        const Kernels& kernels = kernels_for(isa);
        std::vector<Streaming> parsed;
        for (const std::string& policy : policies) parsed.push_back(streaming_of(policy, "a policy"));
        std::vector<Buffer> held;
        std::vector<Bytes> memory;
        for (nb::handle each : arrays) {
            const Buffer& buffer = held.emplace_back(each);
            memory.push_back({buffer.as<const uint8_t>(), buffer.bytes()});
        }
        const nb::gil_scoped_release released;
        return time_streaming(kernels, parsed, rounds, memory);
    }, nb::arg("isa"), nb::arg("policies"), nb::arg("rounds"), nb::arg("arrays"),
               "Seconds of each round, policy by policy, that reading some of the arrays took.");
    module.def("read_all", &read_all, nb::arg("isa"), nb::arg("array"));
}

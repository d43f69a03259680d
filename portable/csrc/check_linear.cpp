// Linear operations' three functions on every instruction set, the emulated ones among them, or on those that are named, on fresh
// random numbers of odd shapes, each array in an allocation of its own. Says where they differ from sums in float64 by more than
// rounding allows, and where a sum's bits depend on what is computed beside it: on the number of tokens, on where a token stands
// among them, or on which rows of weights are asked for together; on a processor with AMX also where its tiles and the emulated
// ones give other bits, and on one with SMMLA where it and SDOT do. Ends with 1 if anything does.
//
//     check_linear [SEED [INSTRUCTION_SET...]]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "isa.h"
#include "memory.h"

using namespace nvtripy_portable;

namespace {

constexpr float kInputScale = 1;  // of inputs rounded to float8: none is beyond its 448

std::mt19937 random_bits;
int failures = 0;

int64_t number(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_bits); }
float normal() { return std::normal_distribution<float>()(random_bits); }

std::vector<float> floats(int64_t count, float spread = 1) {
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = normal() * spread;
    return values;
}

float from_half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const float value = exponent ? std::ldexp(1024.0f + static_cast<float>(mantissa), exponent - 25)
                                 : std::ldexp(static_cast<float>(mantissa), -24);
    return bits & 0x8000 ? -value : value;
}
float from_e4m3(uint8_t bits) {
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    const float value = exponent ? std::ldexp(8.0f + static_cast<float>(mantissa), exponent - 10)
                                 : std::ldexp(static_cast<float>(mantissa), -9);
    return bits & 0x80 ? -value : value;
}

// One linear operation: random codes, and the numbers that they stand for, scaled.
struct Case {
    Dtype dtype;
    int64_t rows, width, block;
    bool integers;
    Rounding rounding = Rounding::none;
    bool normalizes = false;
    std::vector<uint8_t> codes;
    std::vector<float> scales, norm_scale, norm_bias;
    std::vector<double> numbers;
    Linear linear;

    Case(Dtype dtype, int64_t rows, int64_t width, int64_t block, bool integers, Rounding rounding, bool normalizes)
        : dtype(dtype), rows(rows), width(width), block(block), integers(integers), rounding(rounding), normalizes(normalizes) {
        linear.weight.dtype = dtype;
        linear.weight.rows = rows;
        linear.weight.width = width;
        linear.weight.block = block;
        linear.weight.scale_stride = block ? width / block : 1;
        linear.integers = integers;
        linear.stage.width = width;
        linear.stage.rounding = rounding;
        linear.stage.per_token = rounding == Rounding::i8;
        linear.stage.input_scale = kInputScale;
        if (normalizes) {
            norm_scale = floats(width);
            norm_bias = floats(width);
            linear.stage.norm_scale = norm_scale.data();
            linear.stage.norm_bias = norm_bias.data();
            linear.stage.epsilon = 1e-5f;
        }
        scales = floats(rows * linear.weight.scale_stride);
        linear.weight.scales = scales.data();
        codes.resize(static_cast<size_t>(rows * linear.weight.row_bytes()));
        linear.weight.data = codes.data();
        for (int64_t n = 0; n < rows; ++n)
            for (int64_t k = 0; k < width; ++k) numbers.push_back(draw(n, k) * double(scale(n, k)));
    }

    float scale(int64_t n, int64_t k) const {
        return scales[static_cast<size_t>(n * linear.weight.scale_stride + (block ? k / block : 0))];
    }

    double draw(int64_t n, int64_t k) {
        uint8_t* row = codes.data() + n * linear.weight.row_bytes();
        switch (dtype) {
            case Dtype::f32: {
                const float value = normal();
                std::memcpy(row + k * 4, &value, 4);
                return value;
            }
            case Dtype::f16: {  // subnormals among them
                const auto bits = static_cast<uint16_t>(number(0, 0x4200) | (number(0, 1) << 15));
                std::memcpy(row + k * 2, &bits, 2);
                return from_half(bits);
            }
            case Dtype::bf16: {
                float value = normal();
                uint32_t bits;
                std::memcpy(&bits, &value, 4);
                bits &= 0xffff0000u;
                std::memcpy(&value, &bits, 4);
                std::memcpy(row + k * 2, reinterpret_cast<const char*>(&bits) + 2, 2);
                return value;
            }
            case Dtype::f8: {
                const auto bits = static_cast<uint8_t>(number(0, 0x50) | (number(0, 1) << 7));
                row[k] = bits;
                return from_e4m3(bits);
            }
            case Dtype::i8: {
                const int64_t value = number(-128, 127);
                row[k] = static_cast<uint8_t>(value);
                return double(value);
            }
            default: {
                const int64_t value = number(-8, 7);
                row[k / 2] = static_cast<uint8_t>(row[k / 2] | ((value & 15) << (k % 2 * 4)));
                return double(value);
            }
        }
    }

    std::string name() const {
        const char* names[] = {"f32", "f16", "bf16", "i8", "i4", "f8"};
        return std::string(names[static_cast<int>(dtype)]) + (integers ? ", integers" : "") +
               (rounding == Rounding::i8 ? ", int8 inputs" : rounding == Rounding::f8 ? ", float8 inputs" : "") + ", " +
               std::to_string(rows) + " x " + std::to_string(width) + ", blocks of " + std::to_string(block);
    }
};

void fail(const Kernels& kernels, const Case& c, Role role, const std::string& what) {
    if (++failures < 20)
        std::printf("%s, %s, %s: %s\n", kernels.name, c.name().c_str(), role == Role::prompt ? "prompt" : "generated",
                    what.c_str());
}

// y (tokens, rows) of all tokens, which are prepared together, in pieces of random tokens and rows.
std::vector<float> multiplied(const Kernels& kernels, const Case& c, Role role, const std::vector<float>& x, int64_t tokens,
                              bool in_pieces) {
    const int64_t group = kernels.token_group;
    std::vector<float> y(static_cast<size_t>(tokens * c.rows), NAN);
    Memory prepared, scratch;
    const int64_t floats_taken = kernels.prepared_floats(c.linear, role, tokens);
    prepared.reserve(std::max<int64_t>(floats_taken, 1));
    scratch.reserve(std::max(kLinearScratch, (c.width + 127) / 128 * 128));
    if (floats_taken > 0) {
        // Memory holds whatever it held: it must not get into sums.
        std::fill(prepared.data(), prepared.data() + floats_taken, NAN);
        for (int64_t t = 0; t < tokens; t += group)
            kernels.prepare(c.linear, role, x.data(), tokens, t, std::min(t + group, tokens), prepared.data(), scratch.data());
    }
    const float* from = floats_taken > 0 ? prepared.data() : x.data();
    const int64_t most_rows = role == Role::prompt ? kernels.prompt_rows : c.rows;
    const int64_t most_tokens = role == Role::prompt ? kPanelTokens : tokens;
    for (int64_t first = 0; first < tokens;) {
        const int64_t wanted = in_pieces ? number(1, (tokens + group - 1) / group) * group : most_tokens;
        const int64_t count = std::min({wanted, most_tokens, tokens - first});
        for (int64_t begin = 0; begin < c.rows;) {
            const int64_t end = std::min(begin + (in_pieces ? number(1, std::min<int64_t>(most_rows, 40)) : most_rows), c.rows);
            kernels.multiply(c.linear, role, from, tokens, first, count, begin, end, y.data() + first * c.rows + begin, c.rows,
                             scratch.data());
            begin = end;
        }
        first += count;
    }
    return y;
}

// The inputs as the stage leaves them, in float64.
std::vector<double> staged(const Case& c, const float* x) {
    std::vector<double> values(x, x + c.width);
    if (c.normalizes) {
        double mean = 0, variance = 0;
        for (const double value : values) mean += value / double(c.width);
        for (const double value : values) variance += (value - mean) * (value - mean) / double(c.width);
        for (int64_t k = 0; k < c.width; ++k) {
            const auto i = static_cast<size_t>(k);
            values[i] = (values[i] - mean) / std::sqrt(variance + 1e-5) * c.norm_scale[i] + c.norm_bias[i];
        }
    }
    return values;
}

// Whether floats are tiles where they meet tokens of this role.
bool meet_tiles(const Kernels& kernels, Role role) {
    return std::strncmp(kernels.name, "amx", 3) == 0 && (role == Role::prompt || std::strcmp(kernels.name, "amx") != 0);
}

// How far a sum may be from the true one, relative to the norm of its terms: float32's rounding; and where tiles leave out the
// smallest products with float16, 2^-16 of each term at most, twice. Errors of terms are independent.
double allowed(const Case& c, const Kernels& kernels, Role role) {
    const bool leaves_out =
        meet_tiles(kernels, role) && c.dtype == Dtype::f16 && !c.block && c.rounding == Rounding::none;
    return (leaves_out ? 2 * 0x1p-16 : 0) + 2e-6;
}

void check(const Kernels& kernels, const Case& c, Role role, int64_t tokens) {
    std::vector<float> x = floats(tokens * c.width);
    for (int64_t i = 0; i < tokens * c.width; i += 97) x[static_cast<size_t>(i)] *= 30;
    const std::vector<float> y = multiplied(kernels, c, role, x, tokens, false);
    for (int64_t t = 0; t < tokens; ++t) {
        const std::vector<double> input = staged(c, x.data() + t * c.width);
        double largest = 0;
        for (const double value : input) largest = std::max(largest, std::fabs(value));
        for (int64_t n = 0; n < c.rows; ++n) {
            double sum = 0, squares = 0, rounding = 0;
            for (int64_t k = 0; k < c.width; ++k) {
                const double w = c.numbers[static_cast<size_t>(n * c.width + k)], value = input[static_cast<size_t>(k)];
                sum += w * value;
                squares += w * w * value * value;
                // Half a step of what inputs are rounded to; normalization is in float32.
                const double step = c.normalizes && !c.integers ? largest * 1e-6
                                    : c.rounding == Rounding::i8 ? largest / 127 / 2
                                    : c.rounding == Rounding::f8 ? std::max(std::fabs(value) / 16, kInputScale / 1024.0)
                                    : c.integers                 ? largest / 32639 / 2
                                                                 : 0;
                rounding += w * w * step * step;
            }
            const double tolerance = allowed(c, kernels, role) * std::sqrt(squares) + 4 * std::sqrt(rounding) + 1e-6;
            const double got = y[static_cast<size_t>(t * c.rows + n)];
            if (!(std::fabs(got - sum) <= tolerance))
                fail(kernels, c, role, "expected " + std::to_string(sum) + " but got " + std::to_string(got) + " for token " +
                                           std::to_string(t) + ", row " + std::to_string(n));
        }
    }
    // The same bits in pieces, and of single tokens alone, and in another company.
    const auto expect_same = [&](const std::vector<float>& other, int64_t from, int64_t count, const char* what) {
        if (std::memcmp(other.data(), y.data() + from * c.rows, static_cast<size_t>(count * c.rows) * sizeof(float)) != 0)
            fail(kernels, c, role, std::string("other bits ") + what + " of " + std::to_string(tokens) + " tokens");
    };
    expect_same(multiplied(kernels, c, role, x, tokens, true), 0, tokens, "in pieces");
    // Besides tiles, the two differ in the order of a normalization's sums, and in how integers' sums are
    // added up.
    if (meet_tiles(kernels, role) && c.dtype != Dtype::f32 && c.dtype != Dtype::i4 && !c.block &&
        !c.normalizes && !c.integers)
        expect_same(multiplied(kernels_for("amx-emulated"), c, role, x, tokens, false), 0, tokens, "on emulated tiles");
    if (std::strcmp(kernels.name, "i8mm") == 0)
        expect_same(multiplied(kernels_for("dotprod"), c, role, x, tokens, false), 0, tokens, "by dot products");
    for (const int64_t t : {int64_t{0}, number(0, tokens - 1), tokens - 1}) {
        const int64_t count = number(1, tokens - t);
        const std::vector<float> some(x.begin() + t * c.width, x.begin() + (t + count) * c.width);
        expect_same(multiplied(kernels, c, role, some, count, false), t, count, "with fewer");
        const std::vector<float> one(x.begin() + t * c.width, x.begin() + (t + 1) * c.width);
        expect_same(multiplied(kernels, c, role, one, 1, false), t, 1, "alone, out");
    }
}

void check_all(const Kernels& kernels) {
    const auto one = [&](Dtype dtype, int64_t width, int64_t block, bool integers, Rounding rounding) {
        const Case c(dtype, number(1, 80), width, block, integers, rounding, number(0, 1) && rounding == Rounding::none);
        for (const Role role : {Role::generated, Role::prompt})
            for (const int64_t tokens : {int64_t{1}, number(2, 5), number(6, 17), number(18, 64)})
                check(kernels, c, role, tokens);
    };
    for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16, Dtype::f8, Dtype::i8, Dtype::i4}) {
        for (const int64_t width : {int64_t{1}, number(2, 40), number(41, 300), int64_t{384}})
            one(dtype, width, 0, false, Rounding::none);
        one(dtype, number(41, 300), 0, false, Rounding::i8);
        for (const int64_t block : {6, 48, 128}) one(dtype, block * 3, block, false, Rounding::none);
        if (dtype != Dtype::i8 && dtype != Dtype::i4) continue;
        for (const int64_t width : {int64_t{1}, number(2, 40), number(41, 300), int64_t{384}})
            one(dtype, width, 0, true, Rounding::none);
        for (const int64_t block : {32, 64, 96, 128, 256}) one(dtype, block * number(1, 4), block, true, Rounding::none);
        one(dtype, 384, 32, true, Rounding::i8);
        one(dtype, number(41, 300), 0, true, Rounding::i8);
    }
    one(Dtype::f8, number(41, 300), 0, false, Rounding::f8);
    // More numbers, rows and tokens than are taken together.
    check(kernels, Case(Dtype::f16, 150, number(500, 1200), 0, false, Rounding::none, false), Role::prompt, number(20, 40));
    check(kernels, Case(Dtype::i8, 150, number(500, 1200), 0, true, Rounding::none, false), Role::prompt, number(20, 40));
    check(kernels, Case(Dtype::i8, 150, 1024, 32, true, Rounding::i8, false), Role::prompt, number(20, 40));
    check(kernels, Case(Dtype::i4, 150, 96 * 7, 96, true, Rounding::none, false), Role::generated, number(20, 40));
    check(kernels, Case(Dtype::f16, 33, 130, 0, false, Rounding::none, true), Role::prompt, 300);
    check(kernels, Case(Dtype::f16, 33, 130, 0, false, Rounding::none, true), Role::generated, 300);
    check(kernels, Case(Dtype::i4, 33, 256, 64, true, Rounding::none, true), Role::generated, 300);
}

}  // namespace

int main(int count, char** arguments) {
    const unsigned seed = count > 1 ? static_cast<unsigned>(std::strtoul(arguments[1], nullptr, 10)) : 1;
    const std::vector<std::string> named(arguments + std::min(count, 2), arguments + count);
    for (const std::string& name : named.empty() ? testable_isas() : named) {
        random_bits.seed(seed);
        const int before = failures;
        check_all(kernels_for(name));
        std::printf("%s: %s\n", name.c_str(), failures > before ? "failed" : "passed");
    }
    return failures ? 1 : 0;
}

// One product of a weight of 48 x 768 with some tokens, over and over, and nothing else: benchmarks/instructions.py counts the
// instructions of two runs and takes one from the other.
//
//     one_product ISA f16|bf16|f8|i8|i4 generated|prompt TOKENS TIMES
//
// int8 weights have a scale for each row, int4 weights one for each 32 weights, and the inputs of both are made integers.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "isa.h"
#include "memory.h"

using namespace nvtripy_portable;

const std::map<std::string, Dtype> kDtypes = {
    {"f16", Dtype::f16}, {"bf16", Dtype::bf16}, {"f8", Dtype::f8}, {"i8", Dtype::i8}, {"i4", Dtype::i4}};

int main(int count, char** arguments) try {
    if (count != 6) throw std::invalid_argument("expected an instruction set, a type, a role, and numbers of tokens and times");
    const Kernels& kernels = kernels_for(arguments[1]);
    const Role role = std::strcmp(arguments[3], "prompt") == 0 ? Role::prompt : Role::generated;
    const int64_t tokens = std::atoll(arguments[4]), times = std::atoll(arguments[5]);

    Linear linear;
    Matrix& weight = linear.weight;
    weight.rows = 48;
    weight.width = linear.stage.width = 768;
    weight.dtype = kDtypes.at(arguments[2]);
    linear.integers = weight.dtype == Dtype::i8 || weight.dtype == Dtype::i4;
    weight.block = weight.dtype == Dtype::i4 ? 32 : 0;
    weight.scale_stride = weight.block ? weight.width / weight.block : 1;
    const std::vector<float> scales(static_cast<size_t>(weight.rows * weight.scale_stride), 0.5f);
    weight.scales = linear.integers ? scales.data() : nullptr;
    const std::vector<uint8_t> codes(static_cast<size_t>(weight.rows * weight.row_bytes() + (64 << 10)), 0x11);
    weight.data = codes.data();

    const std::vector<float> x(static_cast<size_t>(tokens * weight.width), 1.0f);
    std::vector<float> y(static_cast<size_t>(tokens * weight.rows));
    Memory prepared, scratch;
    scratch.reserve(kLinearScratch);
    const int64_t floats = kernels.prepared_floats(linear, role, tokens);
    prepared.reserve(floats + 1);
    for (int64_t t = 0; floats > 0 && t < tokens; t += kernels.token_group)
        kernels.prepare(linear, role, x.data(), tokens, t, t + kernels.token_group < tokens ? t + kernels.token_group : tokens,
                        prepared.data(), scratch.data());
    for (int64_t i = 0; i < times; ++i)
        kernels.multiply(linear, role, floats > 0 ? prepared.data() : x.data(), tokens, 0, tokens, 0, weight.rows, y.data(),
                         weight.rows, scratch.data());
    std::printf("%g\n", static_cast<double>(y[0]));
    return 0;
} catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
}

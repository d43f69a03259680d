"""Plug-ins in C++ for the tests, compiled by the system's compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from nvtripy_portable import plugins

SOURCE = r"""
#include <cmath>
#include <cstdio>
#include <cstring>

#include "nvtripy_portable_plugin.h"

namespace {

const float* input(const NvtripyPortableCall* call, int number) {
    return static_cast<const float*>(call->inputs[number].data);
}

float* output(const NvtripyPortableCall* call, int number) { return static_cast<float*>(call->outputs[number].data); }

int fail(const NvtripyPortableCall* call, const char* text) {
    std::snprintf(call->message, call->message_size, "%s", text);
    return 1;
}

}  // namespace

extern "C" {

// GELU by its tanh approximation, row by row on all threads.
int gelu(const NvtripyPortableCall* call) {
    if (call->version < 1 || call->inputs[0].dtype != NVTRIPY_PORTABLE_FLOAT32) return fail(call, "expected float32");
    const auto row = [](int64_t unit, void* argument) {
        const auto* call = static_cast<const NvtripyPortableCall*>(argument);
        const int64_t width = call->inputs[0].shape[call->inputs[0].rank - 1];
        for (int64_t i = unit * width; i < (unit + 1) * width; ++i) {
            const float x = input(call, 0)[i];
            output(call, 0)[i] = 0.5f * x * (1 + std::tanh(0.7978845608f * (x + 0.044715f * x * x * x)));
        }
    };
    const int64_t width = call->inputs[0].shape[call->inputs[0].rank - 1];
    call->each(call, nvtripy_portable_count(&call->inputs[0]) / width, row, const_cast<NvtripyPortableCall*>(call));
    return 0;
}

// (rows, width) with weight and bias (width,); epsilon is a field.
int layer_norm(const NvtripyPortableCall* call) {
    if (call->inputs[0].rank != 2 || call->inputs[1].rank != 1) return fail(call, "expected rows");
    const int64_t rows = call->inputs[0].shape[0], width = call->inputs[0].shape[1];
    for (int64_t r = 0; r < rows; ++r) {
        const float* x = input(call, 0) + r * width;
        float mean = 0, variance = 0;
        for (int64_t i = 0; i < width; ++i) mean += x[i];
        mean /= static_cast<float>(width);
        for (int64_t i = 0; i < width; ++i) variance += (x[i] - mean) * (x[i] - mean);
        const float by = 1 / std::sqrt(variance / width + static_cast<float>(nvtripy_portable_number(call, "epsilon")));
        float* y = output(call, 0) + r * width;
        for (int64_t i = 0; i < width; ++i) y[i] = (x[i] - mean) * by * input(call, 1)[i] + input(call, 2)[i];
    }
    return 0;
}

// x @ weight.T, (rows, width) and (outputs, width).
int linear(const NvtripyPortableCall* call) {
    const int64_t rows = call->inputs[0].shape[0], width = call->inputs[0].shape[1], outputs = call->inputs[1].shape[0];
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t o = 0; o < outputs; ++o) {
            float sum = 0;
            for (int64_t i = 0; i < width; ++i) sum += input(call, 0)[r * width + i] * input(call, 1)[o * width + i];
            output(call, 0)[r * outputs + o] = sum;
        }
    return 0;
}

// The bytes as they are, of whatever type; the context counts the calls.
int copy(const NvtripyPortableCall* call) {
    static const int64_t kBytes[] = {4, 2, 2, 1, 1, 1, 4, 8, 1};
    if (call->context) ++*static_cast<int64_t*>(call->context);
    if (call->inputs[0].dtype != call->outputs[0].dtype) return fail(call, "expected one type");
    std::memcpy(call->outputs[0].data, call->inputs[0].data,
                static_cast<size_t>(nvtripy_portable_count(&call->inputs[0]) * kBytes[call->inputs[0].dtype]));
    return 0;
}

// Sum and difference of two inputs.
int sum_and_difference(const NvtripyPortableCall* call) {
    for (int64_t i = 0; i < nvtripy_portable_count(&call->inputs[0]); ++i) {
        output(call, 0)[i] = input(call, 0)[i] + input(call, 1)[i];
        output(call, 1)[i] = input(call, 0)[i] - input(call, 1)[i];
    }
    return 0;
}

// All fields and shapes as text, as an error.
int describe(const NvtripyPortableCall* call) {
    size_t at = 0;
    const auto put = [&](const auto&... arguments) {
        at += static_cast<size_t>(std::snprintf(call->message + at, call->message_size - at, arguments...));
    };
    for (int32_t f = 0; f < call->num_fields; ++f) {
        const NvtripyPortableField& field = call->fields[f];
        put("%s:", field.name);
        const auto* integers = static_cast<const int64_t*>(field.values);
        const auto* numbers = static_cast<const double*>(field.values);
        for (int64_t i = 0; i < field.count && field.type != NVTRIPY_PORTABLE_TEXT; ++i)
            if (field.type == NVTRIPY_PORTABLE_INTEGERS) put(" %d", static_cast<int>(integers[i]));
            else put(" %.2f", numbers[i]);
        if (field.type == NVTRIPY_PORTABLE_TEXT) put(" %s", nvtripy_portable_text(call, field.name));
        put("; ");
    }
    for (int32_t i = 0; i < call->inputs[0].rank; ++i) put("[%d]", static_cast<int>(call->inputs[0].shape[i]));
    return 7;
}

int silent(const NvtripyPortableCall*) { return 3; }

// Fails in every call but the first `context` ones.
int fail_later(const NvtripyPortableCall* call) {
    auto* left = static_cast<int64_t*>(call->context);
    return --*left < 0 ? fail(call, "that was enough") : gelu(call);
}

// The mean of each sequence's rows in place of them: (B, T, width) needs whole sequences.
int means(const NvtripyPortableCall* call) {
    if (call->inputs[0].rank != 3) return fail(call, "expected (B, T, width)");
    const int64_t* shape = call->inputs[0].shape;
    for (int64_t b = 0; b < shape[0]; ++b)
        for (int64_t i = 0; i < shape[2]; ++i) {
            float sum = 0;
            for (int64_t t = 0; t < shape[1]; ++t) sum += input(call, 0)[(b * shape[1] + t) * shape[2] + i];
            const float mean = sum / static_cast<float>(shape[1]);
            for (int64_t t = 0; t < shape[1]; ++t) output(call, 0)[(b * shape[1] + t) * shape[2] + i] = mean;
        }
    return 0;
}

}  // extern "C"
"""


def compiled_library(folder: Path) -> Path:
    """A shared library of ``SOURCE``; without a compiler the test that asks is skipped."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    source, library = folder / "plugins.cpp", folder / "libplugins.so"
    source.write_text(SOURCE)
    options = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *options, "-I", plugins.include_folder(), source, "-o", library], check=True)
    return library

// A plug-in as one of a program's operations: a C function, and what it is given.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

#include "kernels.h"
#include "nvtripy_portable_plugin.h"

namespace nvtripy_portable {

struct PluginField {
    std::string name;
    std::variant<std::vector<int64_t>, std::vector<double>, std::string> values;
};

// A value of the program, which holds float32: the function gets and gives it as `dtype`; or a constant.
struct PluginTensor {
    int value = -1;
    Dtype dtype = Dtype::f32;
    const void* data = nullptr;  // of a constant, with its element type as the header numbers it
    int32_t code = 0;
    std::vector<int64_t> shape;

    bool is_value() const { return value >= 0; }
};

struct Plugin {
    std::string name;      // in words
    std::string location;  // in the user's program, as the end of a message
    NvtripyPortableFunction function = nullptr;
    void* context = nullptr;
    bool has_rows = false;  // values are (rows, width), else of the rank that they have in the graph, 1 to 3
    int rank = 0;
    std::vector<PluginTensor> inputs, outputs;
    std::vector<PluginField> fields;
};

class PluginError : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace nvtripy_portable

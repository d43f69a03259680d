// A graph of fused operations, ready to run in one call.
//
// Values are float32 rows: (batch, length, width). Those between operations live in buffers that are reused; weights and
// tables stay where they are.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "thread_pool.h"

namespace nvtripy_portable {

enum class Kind : int { layer_norm, linear, embedding, last_rows, attention };

constexpr int kNone = -1;

// One operation. Numbers of values and of integer inputs are kNone where there is none.
struct Operation {
    Kind kind = Kind::linear;
    int x = kNone;         // value read
    int y = kNone;         // value written
    int residual = kNone;  // value added

    InputStage stage;  // linear; layer_norm takes only its norm
    Matrix weight;     // linear's weight or embedding's table
    Matrix positions;  // embedding's position table
    const float* bias = nullptr;
    Activation activation = Activation::none;
    bool takes_integers = false;  // linear: inputs may be rounded to 16 bits, block by block, where that is faster

    int tokens = kNone;    // embedding's ids (B, T), among the integer inputs
    int position = kNone;  // embedding's and attention's (B,)
    int last = kNone;      // last_rows' (B,)

    // attention
    int cache = kNone;  // among the caches
    int64_t heads = 0;
    int64_t head_size = 0;
    float score_scale = 1;
    int64_t layer = 0;
    Rounding rounding = Rounding::none;
    float k_scale = 1;
    float v_scale = 1;
};

struct IntegerInput {
    const int32_t* data = nullptr;
    int64_t batch = 0;
    int64_t length = 1;
};

// Keys and values (L, 2, B, H, C, D), written in place.
struct Cache {
    void* data = nullptr;
    Dtype dtype = Dtype::f32;
    int64_t layers = 0, batch = 0, heads = 0, context = 0, head_size = 0;
};

struct FloatArray {
    float* data = nullptr;
    int64_t batch = 0, length = 0;
};

class IndexError : public std::out_of_range {
    using std::out_of_range::out_of_range;
};

class Program {
public:
    // `buffers[v]` is the buffer of value v, or kNone for an input or an output, which the caller gives.
    Program(const Kernels& kernels, std::vector<Operation> operations, std::vector<int> buffers,
            std::vector<int64_t> widths, std::vector<int> inputs, std::vector<int> outputs);

    // Fills the outputs and writes the caches. Everything is checked before anything is written.
    // Throws IndexError for token ids, positions and rows outside of their tables, std::invalid_argument for shapes that
    // do not fit.
    void run(const std::vector<IntegerInput>& integers, const std::vector<Cache>& caches,
             const std::vector<FloatArray>& inputs, const std::vector<FloatArray>& outputs);

    const char* isa() const { return kernels_.name; }

private:
    struct Value {
        float* data = nullptr;
        int64_t batch = 0, length = 0;
        int64_t rows() const { return batch * length; }
    };
    struct Call;

    void plan(Call& call);
    float* memory_of(int thread) { return thread_memory_[static_cast<size_t>(thread)].data(); }
    void execute(const Operation& operation, const Call& call, ThreadPool& pool);
    void layer_norm(const Operation& operation, const Call& call, ThreadPool& pool);
    void linear(const Operation& operation, const Call& call, ThreadPool& pool);
    void embedding(const Operation& operation, const Call& call, ThreadPool& pool);
    void last_rows(const Operation& operation, const Call& call, ThreadPool& pool);
    void attention(const Operation& operation, const Call& call, ThreadPool& pool);

    const Kernels& kernels_;
    std::vector<Operation> operations_;
    std::vector<int> buffers_;
    std::vector<int64_t> widths_;
    std::vector<int> inputs_, outputs_;

    std::mutex mutex_;
    std::vector<Value> values_;
    std::vector<Memory> memory_;         // of buffers
    std::vector<Memory> thread_memory_;  // scratch of each thread
    Memory shared_;                      // scratch of an operation
    int64_t thread_floats_ = 0;
};

}  // namespace nvtripy_portable

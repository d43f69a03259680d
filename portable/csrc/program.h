// A graph of fused operations, ready to run in one call.
//
// Values are float32 rows: (batch, length, width). Those between operations live in buffers that are reused; weights and
// tables stay where they are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "plugin.h"
#include "sequences.h"
#include "thread_pool.h"

namespace nvtripy_portable {

enum class Kind : int { norm, linear, low_rank, embedding, last_rows, attention, plugin, finish };

constexpr int kNone = -1;

// One operation. Numbers of values and of integer inputs are kNone where there is none.
struct Operation {
    Kind kind = Kind::linear;
    int x = kNone;         // value read
    int y = kNone;         // value written
    int residual = kNone;  // value added
    int addend = kNone;    // linear: value added before the activation

    InputStage stage;  // linear; a norm takes only that of it
    Matrix weight;     // linear's weight or embedding's table
    Matrix positions;  // embedding's position table, if it has one
    const float* bias = nullptr;
    Activation activation = Activation::none;
    bool takes_integers = false;  // linear: inputs may be rounded to 16 bits, block by block, where that is faster

    // low_rank: its input has linear's gate, if any
    int slot = kNone;             // (B,), among the integer inputs: which adapter
    int down = kNone, up = kNone; // among the tables
    int64_t outputs = 0;

    int tokens = kNone;    // embedding's ids (B, T), among the integer inputs
    int prompts = kNone;   // embedding: among the tables, rows of the ids that come after the weight's
    int position = kNone;  // embedding's and attention's (B,)
    int last = kNone;      // last_rows' (B,)

    // attention
    int cache = kNone;  // among the caches
    int64_t heads = 0;
    int64_t groups = 0;  // of heads that share keys and values
    int64_t head_size = 0;
    int64_t window = 0;                  // keys that a token sees at most; 0: all
    const float* frequencies = nullptr;  // (half,): queries and keys are turned
    int64_t half = 0;
    float score_scale = 1;
    int64_t layer = 0;
    Rounding rounding = Rounding::none;
    float k_scale = 1;
    float v_scale = 1;

    std::shared_ptr<const Plugin> plugin;  // its first input that is a value is x, its first output y

    Linear linear() const {
        const bool fits = weight.dtype == Dtype::i8 || weight.dtype == Dtype::i4;
        return {stage, weight, takes_integers && fits && stage.rounding != Rounding::f8, takes_integers};
    }
};

struct IntegerInput {
    const int32_t* data = nullptr;
    int64_t batch = 0;
    int64_t length = 1;
};

struct FloatArray {
    float* data = nullptr;
    int64_t batch = 0, length = 0;
};

// What tokens choose of by number: the matrices of adapters, (slots, layers, rank, width), or rows, (1, 1, rows, width).
struct Table {
    const void* data = nullptr;
    Dtype dtype = Dtype::f32;
    int64_t slots = 0, layers = 0, rank = 0, width = 0;

    int64_t layer_bytes() const { return rank * width * (dtype == Dtype::f32 ? 4 : 2); }
    int64_t bytes() const { return slots * layers * layer_bytes(); }
    const void* at(int64_t slot, int64_t layer) const {
        return static_cast<const char*>(data) + (slot * layers + layer) * layer_bytes();
    }
};

class IndexError : public std::out_of_range {
    using std::out_of_range::out_of_range;
};

class Program {
public:
    // `buffers[v]` is the buffer of value v, or kNone for an input or an output, which the caller gives.
    Program(const Kernels& kernels, std::vector<Operation> operations, std::vector<int> buffers,
            std::vector<int64_t> widths, std::vector<int> inputs, std::vector<int> outputs);

    // Sequences of one length beside each other, as the graph has them: fills the outputs and writes the caches. Tokens are
    // generated ones where there is one of each sequence, else a prompt's. Everything is checked before anything is written.
    // Throws IndexError for token ids, positions and rows outside of their tables, std::invalid_argument for shapes that
    // do not fit, and PluginError where a plug-in fails: then caches have been written already.
    void run(const std::vector<IntegerInput>& integers, const std::vector<Cache>& caches, const std::vector<Table>& tables,
             const std::vector<FloatArray>& inputs, const std::vector<FloatArray>& outputs);

    // Any mix of sequences, packed: `tokens` are what the segments say, in their order, generated ones before prompts'; the
    // output has a row for each of `rows`, which are numbers of tokens. What the graph calls the tokens, the positions, the
    // slots and the rows of interest is these. Slots that are `empty` (one byte each; nullptr: none is) have nothing but
    // zeros in the tables. Throws as `run`.
    void step(const IntegerInput& tokens, const std::vector<Segment>& segments, const IntegerInput& rows,
              const std::vector<Cache>& caches, const std::vector<Table>& tables, const uint8_t* empty,
              const FloatArray& output);

    const char* isa() const { return kernels_.name; }

    // The first key that a token at `position` sees in any layer.
    int64_t first_seen(int64_t position) const { return window_ ? std::max<int64_t>(position + 1 - window_, 0) : 0; }

private:
    // (rows, width). Of a model's step the first `generated` rows are generated tokens', the others a prompt's.
    struct Value {
        float* data = nullptr;
        int64_t batch = 0, length = 0;
        int64_t generated = 0;
        bool is_zero = false;  // then its memory holds anything
        int64_t rows() const { return batch * length; }
    };
    // Rows that meet the same adapter.
    struct Together {
        int64_t first, count, slot;
    };
    struct Call {
        const std::vector<Cache>& caches;
        const std::vector<Table>& tables;
        const std::vector<FloatArray>& inputs;
        const std::vector<FloatArray>& outputs;
        const std::vector<IntegerInput>* integers = nullptr;  // of `run`
        // Of `step`:
        const IntegerInput* tokens = nullptr;
        const std::vector<Segment>* segments = nullptr;
        const IntegerInput* rows = nullptr;
        const uint8_t* empty = nullptr;

        const IntegerInput& tokens_of(const Operation& operation) const {
            return tokens ? *tokens : (*integers)[static_cast<size_t>(operation.tokens)];
        }
        // A number for each sequence.
        const int32_t* numbers_of(int input, const char* what, int64_t batch) const {
            const IntegerInput& all = (*integers)[static_cast<size_t>(input)];
            if (all.batch * all.length != batch)
                throw std::invalid_argument(std::string(what) + ": expected " + std::to_string(batch) + " numbers but got " +
                                            std::to_string(all.batch * all.length));
            return all.data;
        }
    };

    void begin(Call& call);
    void plan(Call& call, const Operation& operation, int64_t& shared);
    void give_memory(const Call& call);
    void execute(Call& call);
    const Sequences& sequences_of(Call& call, const Operation& operation, const Value& value);
    float* memory_of(int thread) { return thread_memory_[static_cast<size_t>(thread)].data(); }
    Value& value(int number) { return values_[static_cast<size_t>(number)]; }

    void norm(const Operation& operation, ThreadPool& pool);
    void linear(const Operation& operation, ThreadPool& pool);
    void low_rank(const Operation& operation, const Call& call, ThreadPool& pool);
    const float* addend_of(const Operation& operation, int64_t row);
    int64_t rows_together(const Matrix& weight, const ThreadPool& pool) const;  // that are a unit of work with generated tokens
    void multiply_few(const Operation& operation, ThreadPool& pool);
    void multiply_many(const Operation& operation, Role role, int64_t first, int64_t tokens, ThreadPool& pool);
    void embedding(const Operation& operation, const Call& call, ThreadPool& pool);
    void last_rows(const Operation& operation, const Call& call, ThreadPool& pool);
    void attention(const Operation& operation, Call& call, ThreadPool& pool);
    void plugin(const Operation& operation, ThreadPool& pool);
    int64_t plugin_floats(const Plugin& plugin, int64_t rows) const;  // of scratch memory
    void finish(const Operation& operation, ThreadPool& pool);

    const Kernels& kernels_;
    std::vector<Operation> operations_;
    std::vector<int> buffers_;
    std::vector<int64_t> widths_;
    std::vector<int> inputs_, outputs_;

    std::mutex mutex_;
    std::vector<Value> values_;
    std::vector<Sequences> sequences_;   // of the call at hand, by where their positions come from
    std::vector<int32_t> positions_;     // of each row of a packed call
    std::vector<Together> together_;     // of the operation at hand
    std::vector<Memory> memory_;         // of buffers
    std::vector<Memory> thread_memory_;  // scratch of each thread
    Memory shared_;                      // scratch of an operation
    int64_t thread_floats_ = 0, few_floats_ = 0;
    int64_t window_ = 0;  // the largest of all layers; 0 where one sees all
};

constexpr int64_t kFewGenerated = 4;  // tokens whose inputs every thread prepares for itself

int64_t padded(int64_t width);
int64_t divide_up(int64_t a, int64_t b);

}  // namespace nvtripy_portable

// Sums and concatenations over the ranks of a job: what TensorRT-LLM's plug-ins AllReduce and AllGather mean here. A library
// of its own, through the same header as anybody's plug-ins.
//
// Nothing is linked with MPI, whose implementations agree on names, not on types: a handle is an int in MPICH and a pointer in
// Open MPI and in the standard's own ABI (MPI 5.0, chapter 20). Functions and handles come with the context, from whichever
// library the process has loaded.
//
// A sum is the same on every rank and with every transport, to the last bit: all ranks' rows are gathered, and each rank adds
// them in the ranks' order. For the few kilobytes of a decoding step that is as fast as MPI_Allreduce, whose order is its own.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <vector>

#include "nvtripy_portable_plugin.h"

namespace {

// As collectives.py has it.
struct Context {
    void* all_gather;          // MPI_Allgather
    void* error_string;        // MPI_Error_string
    const void* communicator;  // where its handle is
    const void* byte_type;     // where that of MPI_BYTE is
    int64_t handle_bytes;      // 4 or 8
    int64_t ranks;
};

constexpr int64_t kPiece = 16384;  // floats of each rank at a time: what was gathered is still in the cache when it is summed

template <class Handle>
int gather_with(const Context& context, const void* from, int64_t bytes, void* to) {
    using Gather = int (*)(const void*, int, Handle, void*, int, Handle, Handle);
    const auto type = *static_cast<const Handle*>(context.byte_type);
    const int count = static_cast<int>(bytes);
    return reinterpret_cast<Gather>(context.all_gather)(from, count, type, to, count, type,
                                                        *static_cast<const Handle*>(context.communicator));
}

int fail(const NvtripyPortableCall* call, const char* text) {
    std::snprintf(call->message, call->message_size, "%s", text);
    return 1;
}

// Every rank's `count` floats, one rank's behind the other's. Returns 0, or an error with its text.
int gather(const NvtripyPortableCall* call, const float* from, int64_t count, float* to) {
    const auto& context = *static_cast<const Context*>(call->context);
    const int64_t bytes = count * static_cast<int64_t>(sizeof(float));
    const int code = context.handle_bytes == 4 ? gather_with<int>(context, from, bytes, to)
                                               : gather_with<void*>(context, from, bytes, to);
    if (code == 0) return 0;
    char text[1024] = "";  // longer than MPI_MAX_ERROR_STRING of any of them
    int length = 0;
    reinterpret_cast<int (*)(int, char*, int*)>(context.error_string)(code, text, &length);
    std::snprintf(call->message, call->message_size, "MPI: %s", text);
    return 1;
}

int check(const NvtripyPortableCall* call) {
    const auto* context = static_cast<const Context*>(call->context);
    const NvtripyPortableField* group = nvtripy_portable_field(call, "group");
    if (!group || group->count != context->ranks) return fail(call, "expected a group of all ranks");
    if (call->inputs[0].dtype != NVTRIPY_PORTABLE_FLOAT32) return fail(call, "expected float32");
    return 0;
}

}  // namespace

extern "C" {

// (...) of every rank → their sum.
int all_reduce(const NvtripyPortableCall* call) {
    static thread_local std::vector<float> gathered;
    if (check(call) != 0) return 1;
    const int64_t ranks = static_cast<const Context*>(call->context)->ranks;
    const int64_t count = nvtripy_portable_count(&call->inputs[0]);
    const auto* x = static_cast<const float*>(call->inputs[0].data);
    auto* y = static_cast<float*>(call->outputs[0].data);
    for (int64_t begin = 0; begin < count; begin += kPiece) {
        const int64_t size = std::min(kPiece, count - begin);
        gathered.resize(static_cast<size_t>(ranks * size));
        if (gather(call, x + begin, size, gathered.data()) != 0) return 1;
        const float* of_rank = gathered.data();
        std::copy_n(of_rank, size, y + begin);
        for (int64_t rank = 1; rank < ranks; ++rank) {
            of_rank += size;
            for (int64_t i = 0; i < size; ++i) y[begin + i] += of_rank[i];
        }
    }
    return 0;
}

// (rows, width) of every rank → (rows, columns): their columns one behind the other, cut off where the output ends.
int all_gather_columns(const NvtripyPortableCall* call) {
    static thread_local std::vector<float> gathered;
    if (check(call) != 0) return 1;
    const int64_t ranks = static_cast<const Context*>(call->context)->ranks;
    const int64_t rows = call->inputs[0].shape[0], width = call->inputs[0].shape[1], columns = call->outputs[0].shape[1];
    const int64_t some = std::max<int64_t>(1, 16 * kPiece / width);  // rows at a time
    const auto* x = static_cast<const float*>(call->inputs[0].data);
    auto* y = static_cast<float*>(call->outputs[0].data);
    for (int64_t begin = 0; begin < rows; begin += some) {
        const int64_t here = std::min(some, rows - begin);
        gathered.resize(static_cast<size_t>(ranks * here * width));
        if (gather(call, x + begin * width, here * width, gathered.data()) != 0) return 1;
        for (int64_t rank = 0; rank < ranks; ++rank)
            for (int64_t row = 0; row < here; ++row) {
                const int64_t first = rank * width, count = std::min(width, columns - first);
                if (count <= 0) continue;
                std::copy_n(gathered.data() + (rank * here + row) * width, count, y + (begin + row) * columns + first);
            }
    }
    return 0;
}

}  // extern "C"

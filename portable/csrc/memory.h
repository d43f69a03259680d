// Memory for float32 numbers, aligned to cache lines, that grows and keeps nothing.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace nvtripy_portable {

class Memory {
public:
    Memory() = default;
    Memory(Memory&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), count_(std::exchange(other.count_, 0)) {}
    Memory& operator=(Memory&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(count_, other.count_);
        return *this;
    }
    ~Memory() { std::free(data_); }

    float* data() const { return data_; }

    // Room for `count` numbers. New memory is not touched, so what is never used takes no memory.
    void reserve(int64_t count) {
        if (count <= count_) return;
        std::free(data_);
        count_ = 0;
        data_ = static_cast<float*>(std::aligned_alloc(64, (static_cast<size_t>(count) * sizeof(float) + 63) / 64 * 64));
        if (!data_) throw std::bad_alloc();
        count_ = count;
    }

private:
    float* data_ = nullptr;
    int64_t count_ = 0;
};

}  // namespace nvtripy_portable

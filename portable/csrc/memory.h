// Memory for float32 numbers, aligned to cache lines, that grows and keeps nothing.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>
#ifdef __linux__
#include <sys/mman.h>
#endif

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

    // Room for `count` numbers. New memory is not touched, so what is never used takes no memory. Much of it is asked for in
    // large pages: sums of many tokens are written to a page each, more than a processor remembers.
    void reserve(int64_t count) {
        if (count <= count_) return;
        std::free(data_);
        count_ = 0;
        const size_t bytes = static_cast<size_t>(count) * sizeof(float), unit = bytes < kLargePage ? 64 : kLargePage;
        data_ = static_cast<float*>(std::aligned_alloc(unit, (bytes + unit - 1) / unit * unit));
        if (!data_) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
        if (unit == kLargePage) madvise(data_, (bytes + unit - 1) / unit * unit, MADV_HUGEPAGE);
#endif
        count_ = count;
    }

private:
    static constexpr size_t kLargePage = 2 << 20;
    float* data_ = nullptr;
    int64_t count_ = 0;
};

}  // namespace nvtripy_portable

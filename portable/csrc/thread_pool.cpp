#include "thread_pool.h"

#include <unistd.h>

#include <chrono>
#include <stdexcept>

#if defined(__linux__)
#include <sched.h>
#endif

namespace nvtripy_portable {

namespace {

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

using Clock = std::chrono::steady_clock;

// In time and not in looks, which take 40 cycles on one processor and 140 on another.
constexpr std::chrono::microseconds kLook{200};       // for the next task: about a decoding step's work outside of a run
constexpr std::chrono::microseconds kLookForEnd{60};  // of a task: longer than units take
constexpr int kLooks = 64;                            // between two looks at the clock

// The core that this thread is on, or -1 where that cannot be asked.
inline int current_core() {
#if defined(__linux__)
    return sched_getcpu();
#else
    return -1;
#endif
}

}  // namespace

int usable_cores() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set) > 0 ? CPU_COUNT(&set) : 1;
#endif
    const int cores = static_cast<int>(std::thread::hardware_concurrency());
    return cores > 0 ? cores : 1;
}

ThreadPool& ThreadPool::instance() {
    static std::mutex mutex;
    static ThreadPool* pool = nullptr;
    static pid_t owner = 0;
    const std::lock_guard<std::mutex> lock(mutex);
    if (!pool || owner != getpid()) {  // a forked child has no threads but the one that forked
        pool = new ThreadPool(pool ? pool->threads() : usable_cores());
        owner = getpid();
    }
    return *pool;
}

void ThreadPool::set_threads(int threads) {
    if (threads < 1) throw std::invalid_argument("expected at least 1 thread but got " + std::to_string(threads));
    threads_ = threads;
}

void ThreadPool::start_workers() {
    stop_workers();
    ranges_ = std::vector<Range>(static_cast<size_t>(threads_));
    for (int thread = 1; thread < threads_; ++thread) workers_.emplace_back(&ThreadPool::work, this, thread);
}

void ThreadPool::stop_workers() {
    is_stopping_.store(true);
    wake_workers();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    is_stopping_.store(false);
}

void ThreadPool::share(Task task, int64_t units) {
    task_ = task;
    units_ = static_cast<uint32_t>(units);
    caller_core_.store(current_core(), std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    const uint32_t number = number_.load(std::memory_order_relaxed) + 1;
    for (int thread = 0; thread < team(); ++thread)
        ranges_[static_cast<size_t>(thread)].word.store(
            range(number, end_of_range(units, thread - 1), end_of_range(units, thread)), std::memory_order_release);
    number_.store(number);
    // Both in the one order that all threads agree on: either this sees who is about to sleep, or they see the number.
    if (sleepers_.load() > 0) wake_workers();
    uint64_t last_task = kNoTask;
    take_units(0, last_task);
    wait_until_done(units_);
}

// What is left is in the hands of workers. One that does not finish soon has lost its core, and may need this one. Asleep,
// not by yielding: two threads that yield to each other on one core stay there, with another core idle beside them, while
// one that wakes up is put where there is room.
void ThreadPool::wait_until_done(uint32_t units) {
    Clock::time_point end{};
    do {
        for (int look = 0; look < kLooks; ++look) {
            if (done_.load(std::memory_order_acquire) == units) return;
            relax();
        }
        if (end == Clock::time_point{}) end = Clock::now() + kLookForEnd;
    } while (Clock::now() < end);
    is_caller_asleep_.store(true);
    for (uint32_t done = done_.load(); done != units; done = done_.load()) done_.wait(done);
    is_caller_asleep_.store(false, std::memory_order_relaxed);
}

void ThreadPool::take_units(int thread, uint64_t& last_task) {
    const int threads = static_cast<int>(ranges_.size());
    for (int i = 0; i < threads; ++i) take_from((thread + i) % threads, thread, last_task);
}

void ThreadPool::take_from(int owner, int thread, uint64_t& last_task) {
    std::atomic<uint64_t>& word = ranges_[static_cast<size_t>(owner)].word;
    uint64_t left = word.load(std::memory_order_acquire);
    while (begin_of(left) < end_of(left)) {
        const bool is_own = owner == thread;
        const uint64_t rest = is_own ? left + 1 : left - kOneFromTheEnd;
        if (!word.compare_exchange_weak(left, rest, std::memory_order_acq_rel)) continue;
        // The task stays until this unit is done.
        const bool is_first = number_of(left) != last_task;
        last_task = number_of(left);
        const uint32_t units = units_;
        task_.call(task_.context, is_own ? begin_of(left) : end_of(left) - 1, thread, is_first);
        // In the one order that all threads agree on: either the caller sees the sum, or this sees that it sleeps.
        if (done_.fetch_add(1) + 1 == units && is_caller_asleep_.load()) done_.notify_one();
        left = word.load(std::memory_order_acquire);
    }
}

void ThreadPool::work(int thread) {
    uint64_t last_task = kNoTask;
    while (!is_stopping_.load(std::memory_order_relaxed)) {
        const uint32_t number = number_.load(std::memory_order_acquire);
        take_units(thread, last_task);
        wait_for_task(number);
    }
}

// First by looking, which costs a core but answers within nanoseconds, then asleep. At once where that core is the
// caller's: it would wait for this thread to stop looking.
void ThreadPool::wait_for_task(uint32_t old) {
    const auto end = Clock::now() + kLook;
    do {
        for (int look = 0; look < kLooks; ++look) {
            if (number_.load(std::memory_order_relaxed) != old) return;
            relax();
        }
        const int core = current_core();
        if (core >= 0 && core == caller_core_.load(std::memory_order_relaxed)) break;
    } while (Clock::now() < end);
    const uint32_t wakes = wakes_.load();
    sleepers_.fetch_add(1);
    if (number_.load() == old && !is_stopping_.load()) wakes_.wait(wakes);
    sleepers_.fetch_sub(1);
}

void ThreadPool::wake_workers() {
    wakes_.fetch_add(1);
    wakes_.notify_all();
}

}  // namespace nvtripy_portable

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

// Waits until `value` is no longer `old`: first by looking, which costs a core but answers within nanoseconds, then
// asleep.
void wait_while(const std::atomic<uint32_t>& value, uint32_t old, std::chrono::microseconds spin) {
    for (int i = 0; i < 256; ++i) {
        if (value.load(std::memory_order_acquire) != old) return;
        relax();
    }
    const auto end = std::chrono::steady_clock::now() + spin;
    while (std::chrono::steady_clock::now() < end)
        for (int i = 0; i < 64; ++i) {
            if (value.load(std::memory_order_acquire) != old) return;
            relax();
        }
    while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

constexpr std::chrono::microseconds kBetweenJobs{200};  // about a decoding step's work outside of a run
constexpr std::chrono::microseconds kAtBarrier{100};

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
        pool = new ThreadPool(pool ? pool->threads_ : usable_cores());
        owner = getpid();
    }
    return *pool;
}

void ThreadPool::set_threads(int threads) {
    if (threads < 1) throw std::invalid_argument("expected at least 1 thread but got " + std::to_string(threads));
    const std::lock_guard<std::mutex> lock(calls_);
    threads_ = threads;
}

void ThreadPool::start_workers() {
    stop_workers();
    team_ = threads_;
    const uint32_t generation = generation_.load();
    for (int thread = 1; thread < team_; ++thread) workers_.emplace_back(&ThreadPool::work, this, thread, generation);
}

void ThreadPool::stop_workers() {
    if (workers_.empty()) return;
    stopping_.store(true);
    generation_.fetch_add(1);
    generation_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    stopping_.store(false);
}

void ThreadPool::work(int thread, uint32_t generation) {
    for (;;) {
        wait_while(generation_, generation, kBetweenJobs);
        ++generation;
        if (stopping_.load()) return;
        Team team(*this, thread, team_);
        (*job_)(team);
        arrive();
    }
}

void ThreadPool::run(const std::function<void(Team&)>& job) {
    const std::lock_guard<std::mutex> lock(calls_);
    if (team_ != threads_) start_workers();
    Team team(*this, 0, team_);
    if (team_ == 1) {
        job(team);
        return;
    }
    job_ = &job;
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    job(team);
    arrive();
}

// The last of the team to arrive sets the others free.
void ThreadPool::arrive() {
    const uint32_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == team_ - 1) {
        arrived_.store(0, std::memory_order_relaxed);
        next_unit_.store(0, std::memory_order_relaxed);
        phase_.store(phase + 1, std::memory_order_release);
        phase_.notify_all();
    } else {
        wait_while(phase_, phase, kAtBarrier);
    }
}

int64_t Team::take() { return pool_.next_unit_.fetch_add(1, std::memory_order_relaxed); }

void Team::barrier() { pool_.arrive(); }

}  // namespace nvtripy_portable

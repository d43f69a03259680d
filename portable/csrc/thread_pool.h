// One pool of threads that stay: between calls they spin for a moment, then sleep.
//
// A job is run by all threads of the team from beginning to end (SPMD); inside, `each` shares out units of work, first
// come, first served, and is a barrier. Which thread computes a unit never changes what comes out.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace nvtripy_portable {

class ThreadPool;

// What one thread of a team sees of it.
class Team {
public:
    Team(ThreadPool& pool, int thread, int size) : pool_(pool), thread_(thread), size_(size) {}
    int thread() const { return thread_; }
    int size() const { return size_; }

    // Calls work(unit) for every unit in [0, units), shared out among the team. Returns when all are done.
    template <class Work>
    void each(int64_t units, const Work& work) {
        if (size_ == 1) {
            for (int64_t unit = 0; unit < units; ++unit) work(unit);
            return;
        }
        for (int64_t unit = take(); unit < units; unit = take()) work(unit);
        barrier();
    }

private:
    int64_t take();
    void barrier();

    ThreadPool& pool_;
    int thread_;
    int size_;
};

class ThreadPool {
public:
    // The pool of this process, made at first use. It is never destroyed: its threads may be asleep when the process ends.
    static ThreadPool& instance();

    int threads() const { return threads_; }
    // Takes effect at the next call. Throws std::invalid_argument for less than 1.
    void set_threads(int threads);

    // Runs job(team) on all threads and returns when they have finished. Calls from several threads queue up.
    void run(const std::function<void(Team&)>& job);

private:
    friend class Team;
    explicit ThreadPool(int threads) : threads_(threads) {}
    void start_workers();
    void stop_workers();
    void work(int thread, uint32_t generation);
    void arrive();

    std::mutex calls_;
    int threads_;
    int team_ = 1;
    std::vector<std::thread> workers_;
    const std::function<void(Team&)>* job_ = nullptr;

    alignas(64) std::atomic<uint32_t> generation_{0};  // of jobs
    alignas(64) std::atomic<int64_t> next_unit_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};  // of barriers
    std::atomic<bool> stopping_{false};
};

// How many cores this process may use.
int usable_cores();

}  // namespace nvtripy_portable

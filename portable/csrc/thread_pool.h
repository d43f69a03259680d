// One pool of threads that stay: between tasks they look for the next one for a moment, then sleep.
//
// A task is a number of units of work, taken by whoever is free: the calling thread, and the workers. The caller goes on as
// soon as the units are done, not when all workers have come by: one that the system has put aside, because other programs
// want its core, holds nobody up unless it is in the middle of a unit. Which thread computes a unit never changes what comes
// out.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace nvtripy_portable {

class ThreadPool {
public:
    // The pool of this process, made at first use. It is never destroyed: its threads may be asleep when the process ends.
    static ThreadPool& instance();

    int threads() const { return threads_; }
    // Takes effect at the next call. Throws std::invalid_argument for less than 1.
    void set_threads(int threads);

    // Runs job(pool) on this thread, with the workers at its disposal. Calls from several threads queue up.
    template <class Job>
    void run(const Job& job) {
        const std::lock_guard<std::mutex> lock(calls_);
        if (team() != threads()) start_workers();
        job(*this);
    }

    // Within `run`: how many threads share its tasks.
    int team() const { return static_cast<int>(workers_.size()) + 1; }

    // Within `run`: calls work(unit, thread) for every unit in [0, units), and prepare(thread) before a thread's first one.
    // `thread` is a number below `team()`: of the scratch memory that it may use. Returns when all are done.
    template <class Prepare, class Work>
    void each(int64_t units, const Prepare& prepare, const Work& work) {
        if (units == 1 || team() == 1) {
            if (units > 0) prepare(0);
            for (int64_t unit = 0; unit < units; ++unit) work(unit, 0);
            return;
        }
        struct Context {
            const Prepare& prepare;
            const Work& work;
            int64_t begin;
        } context{prepare, work, 0};
        for (; context.begin < units; context.begin += kMostUnits)
            share({[](const void* pointer, int64_t unit, int thread, bool is_first) {
                       const auto& context = *static_cast<const Context*>(pointer);
                       if (is_first) context.prepare(thread);
                       context.work(context.begin + unit, thread);
                   },
                   &context},
                  std::min(units - context.begin, kMostUnits));
    }

    template <class Work>
    void each(int64_t units, const Work& work) {
        each(units, [](int) {}, work);
    }

private:
    struct Task {
        void (*call)(const void* context, int64_t unit, int thread, bool is_first) = nullptr;
        const void* context = nullptr;
    };

    // A ticket says which task it is of (32 bits), how many units that has and which is the next (16 bits each). Whoever
    // changes it from one number to the next has taken that unit.
    static constexpr int64_t kMostUnits = (1 << 16) - 1;
    static uint64_t next(uint64_t ticket) { return ticket & 0xFFFF; }
    static uint64_t units(uint64_t ticket) { return ticket >> 16 & 0xFFFF; }
    static uint32_t number(uint64_t ticket) { return static_cast<uint32_t>(ticket >> 32); }

    static constexpr uint64_t kNoTask = ~uint64_t{0};

    explicit ThreadPool(int threads) : threads_(threads) {}
    void start_workers();
    void stop_workers();
    void share(Task task, int64_t units);
    // Takes units of the task at hand until there is none left. `last_task` is the number of the last one that it found.
    void take_units(int thread, uint64_t& last_task);
    void wait_until_done(uint32_t units);
    void work(int thread);
    void wait_for_task(uint64_t old);
    void wake_workers();

    std::mutex calls_;
    std::atomic<int> threads_;
    std::vector<std::thread> workers_;
    Task task_;  // changes only while no unit of it is left to be done

    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<uint32_t> done_{0};
    std::atomic<bool> is_caller_asleep_{false};
    alignas(64) std::atomic<int> sleepers_{0};
    std::atomic<int> caller_core_{-1};
    std::atomic<uint32_t> wakes_{0};
    std::atomic<bool> is_stopping_{false};
};

// How many cores this process may use.
int usable_cores();

}  // namespace nvtripy_portable

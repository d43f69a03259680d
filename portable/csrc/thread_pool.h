// One pool of threads that stay: between tasks they look for the next one for a moment, then sleep.
//
// A task is a number of units of work. Each thread, the caller among them, has a range of neighbouring ones, so that it reads
// on in memory where it has just been, and asks for what it will need itself; who has finished takes over units from the ends
// of the others' ranges. The caller goes on as soon as the units are done, not when all workers have come by: one that the
// system has put aside, because other programs want its core, holds nobody up unless it is in the middle of a unit. Which
// thread computes a unit never changes what comes out.
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

    // Within `run`: where the range of a thread ends that shares `units` units with the others; it takes them in rising order.
    int64_t end_of_range(int64_t units, int thread) const { return units * (thread + 1) / team(); }

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

    static constexpr int64_t kMostUnits = (1 << 16) - 1;

    // What is left of a thread's units: the task's number (32 bits), where they end and where they begin (16 bits each).
    // Whoever moves the begin or the end by one has taken that unit.
    struct alignas(64) Range {
        std::atomic<uint64_t> word{0};
    };
    static constexpr uint64_t kOneFromTheEnd = 1 << 16;
    static uint64_t range(uint32_t number, int64_t begin, int64_t end) {
        return static_cast<uint64_t>(number) << 32 | static_cast<uint64_t>(end) << 16 | static_cast<uint64_t>(begin);
    }
    static int64_t begin_of(uint64_t range) { return static_cast<int64_t>(range & 0xFFFF); }
    static int64_t end_of(uint64_t range) { return static_cast<int64_t>(range >> 16 & 0xFFFF); }
    static uint32_t number_of(uint64_t range) { return static_cast<uint32_t>(range >> 32); }

    static constexpr uint64_t kNoTask = ~uint64_t{0};

    explicit ThreadPool(int threads) : threads_(threads) {}
    void start_workers();
    void stop_workers();
    void share(Task task, int64_t units);
    // Takes units of the task at hand until there is none left: its own, then others'. `last_task` is the number of the
    // last one that it found.
    void take_units(int thread, uint64_t& last_task);
    void take_from(int owner, int thread, uint64_t& last_task);
    void wait_until_done(uint32_t units);
    void work(int thread);
    void wait_for_task(uint32_t old);
    void wake_workers();

    std::mutex calls_;
    std::atomic<int> threads_;
    std::vector<std::thread> workers_;
    Task task_;  // changes only while no unit of it is left to be done
    uint32_t units_ = 0;
    std::vector<Range> ranges_;  // of each thread, the caller's first

    alignas(64) std::atomic<uint32_t> number_{0};  // of the task at hand
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

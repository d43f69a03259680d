// How weights stream from memory: the hint with which they are asked for, and how far ahead of their use. Processors differ
// by more than a factor of two in which is best, so it is chosen at run time (tuning.h). It never changes what comes out.
#pragma once

#include <cstdint>

namespace nvtripy_portable {

// t0: into every cache; t1: into the second level and what is behind it; nta: past the caches, as they hold what everybody
// else needs, and this is read once a step; none: the processor sees to it by itself.
enum class Hint : int { t0, t1, nta, none };

// The distance reaches into the rows that come next: they lie one behind the other and are read in that order. Memory takes
// a hundred to some hundred nanoseconds to answer, in which a core uses up to 10 KB; what has come waits in a cache.
struct Streaming {
    Hint hint = Hint::t0;
    int64_t bytes_ahead = 16384;
};

// What the kernels go by. It changes only within ThreadPool::run, when none of them is at work. Hidden: its address is known
// when the library is linked, not looked up.
extern Streaming streaming __attribute__((visibility("hidden")));

// Asks for the first `bytes_ahead` bytes of what is about to be streamed; the kernels ask for those behind them.
void ask_for_first(const void* p);

}  // namespace nvtripy_portable

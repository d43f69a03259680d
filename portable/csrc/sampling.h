// Picking one of many logits.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "kernels.h"

namespace nvtripy_portable {

// The k largest of x, none of which is NaN, in falling order, the lower index first among equals: their indices.
std::vector<int64_t> largest(const Kernels& kernels, const float* x, int64_t count, int64_t k);

// The index on which `uniform`, a number from [0, 1), falls among the k largest logits, each as wide as its probability:
// exp(logit / temperature) over the sum. With min_p, only those count that have at least that share of the largest one's
// probability; with top_p, of those only the first that together reach that share.
// kNoNumbers where a logit is NaN or infinite, or all are minus infinity; a single one of those has no share.
constexpr int64_t kNoNumbers = -1;
int64_t draw(const Kernels& kernels, const float* logits, int64_t count, double uniform, double temperature, int64_t k,
             std::optional<double> top_p, std::optional<double> min_p = std::nullopt);

// What a request asks of logits before one is drawn, in this order: a bias; the division (of what is above 0) or the product
// by `repetition` for each token seen; for each of those that were generated `frequency` times their count and `presence`
// are taken off; where `allowed` has any, all others become minus infinity, and so do those that are forbidden.
struct Adjustment {
    std::span<const int32_t> biased;
    std::span<const double> bias;
    std::span<const int32_t> seen;
    std::span<const int32_t> counts;  // how often each of `seen` was generated; 0: of the prompt only
    double repetition = 1, frequency = 0, presence = 0;
    std::span<const int32_t> allowed;
    std::span<const int32_t> forbidden;
};

// `logits`, adjusted, to `out`. All ids are below `count`, which the caller sees to.
void adjust(const float* logits, int64_t count, const Adjustment& how, float* out);

// The logarithm of the sum of exp(x), none of which is NaN: summed in double, in order, after the largest was taken off.
double log_sum_exp(const float* x, int64_t count);

}  // namespace nvtripy_portable

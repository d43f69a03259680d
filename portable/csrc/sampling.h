// Picking one of many logits.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "kernels.h"

namespace nvtripy_portable {

// The k largest of x, none of which is NaN, in falling order, the lower index first among equals: their indices.
std::vector<int64_t> largest(const Kernels& kernels, const float* x, int64_t count, int64_t k);

// The index on which `uniform`, a number from [0, 1), falls among the k largest logits, each as wide as its probability:
// exp(logit / temperature) over the sum. With top_p, only the first of them count that together reach that share.
// kNoNumbers where a logit is NaN or infinite, or all are minus infinity; a single one of those has no share.
constexpr int64_t kNoNumbers = -1;
int64_t draw(const Kernels& kernels, const float* logits, int64_t count, double uniform, double temperature, int64_t k,
             std::optional<double> top_p);

}  // namespace nvtripy_portable

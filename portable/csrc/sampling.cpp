#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

namespace nvtripy_portable {

namespace {

constexpr int64_t kBlock = 128;  // logits of which one maximum is taken

// What may be among the k largest. Blocks whose maximum is less than the k-th largest maximum hold none of them.
std::vector<int64_t> candidates_of(const Kernels& kernels, const float* x, int64_t count, int64_t k) {
    const int64_t blocks = (count + kBlock - 1) / kBlock;
    std::vector<float> maxima(static_cast<size_t>(blocks));
    kernels.block_maxima(x, count, kBlock, maxima.data());
    float least = -std::numeric_limits<float>::infinity();
    if (k < blocks) {
        std::vector<float> order = maxima;
        std::nth_element(order.begin(), order.begin() + (k - 1), order.end(), std::greater<>());
        least = order[static_cast<size_t>(k - 1)];
    }
    std::vector<int64_t> candidates;
    for (int64_t b = 0; b < blocks; ++b)
        if (maxima[static_cast<size_t>(b)] >= least)
            for (int64_t i = b * kBlock; i < std::min((b + 1) * kBlock, count); ++i)
                if (!(x[i] < least)) candidates.push_back(i);
    return candidates;
}

}  // namespace

std::vector<int64_t> largest(const Kernels& kernels, const float* x, int64_t count, int64_t k) {
    k = std::clamp<int64_t>(k, 0, count);
    if (k == 0) return {};
    std::vector<int64_t> candidates = candidates_of(kernels, x, count, k);
    const auto comes_first = [x](int64_t a, int64_t b) {
        // NaN last, so that the order is one.
        const float p = x[a] == x[a] ? x[a] : -std::numeric_limits<float>::infinity();
        const float q = x[b] == x[b] ? x[b] : -std::numeric_limits<float>::infinity();
        return p > q || (p == q && a < b);
    };
    const auto end = candidates.begin() + std::min<int64_t>(k, static_cast<int64_t>(candidates.size()));
    if (end == candidates.end())
        std::sort(candidates.begin(), end, comes_first);
    else
        std::partial_sort(candidates.begin(), end, candidates.end(), comes_first);
    candidates.erase(end, candidates.end());
    return candidates;
}

int64_t draw(const Kernels& kernels, const float* logits, int64_t count, double uniform, double temperature, int64_t k,
             std::optional<double> top_p) {
    const std::vector<int64_t> ids = largest(kernels, logits, count, k);
    const auto scaled = [&](int64_t id) { return static_cast<double>(logits[id]) / temperature; };
    const double most = scaled(ids[0]);
    double sum = 0;
    std::vector<double> cumulative;
    cumulative.reserve(ids.size());
    for (const int64_t id : ids) cumulative.push_back(sum += std::exp(scaled(id) - most));
    auto end = cumulative.end();
    // Up to and with the one that takes the sum over the bar, so that at least one stays.
    if (top_p) end = std::min(std::lower_bound(cumulative.begin(), end, *top_p * sum) + 1, end);
    const auto drawn = std::min(std::upper_bound(cumulative.begin(), end, uniform * *(end - 1)), end - 1);
    return ids[static_cast<size_t>(drawn - cumulative.begin())];
}

}  // namespace nvtripy_portable

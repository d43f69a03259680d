#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

namespace nvtripy_portable {

namespace {

constexpr int64_t kBlock = 128;  // logits of which one maximum is taken

std::vector<float> maxima_of(const Kernels& kernels, const float* x, int64_t count) {
    std::vector<float> maxima(static_cast<size_t>((count + kBlock - 1) / kBlock));
    kernels.block_maxima(x, count, kBlock, maxima.data());
    return maxima;
}

// The k largest of x, given the maxima of its blocks. Blocks whose maximum is less than the k-th largest maximum hold none
// of them.
std::vector<int64_t> largest_of(const float* x, int64_t count, int64_t k, const std::vector<float>& maxima) {
    k = std::clamp<int64_t>(k, 0, count);
    if (k == 0) return {};
    const auto blocks = static_cast<int64_t>(maxima.size());
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
                if (x[i] >= least) candidates.push_back(i);
    const auto comes_first = [x](int64_t a, int64_t b) { return x[a] > x[b] || (x[a] == x[b] && a < b); };
    const auto end = candidates.begin() + std::min<int64_t>(k, static_cast<int64_t>(candidates.size()));
    if (end == candidates.end())
        std::sort(candidates.begin(), end, comes_first);
    else
        std::partial_sort(candidates.begin(), end, candidates.end(), comes_first);
    candidates.erase(end, candidates.end());
    return candidates;
}

}  // namespace

std::vector<int64_t> largest(const Kernels& kernels, const float* x, int64_t count, int64_t k) {
    return largest_of(x, count, k, maxima_of(kernels, x, count));
}

int64_t draw(const Kernels& kernels, const float* logits, int64_t count, double uniform, double temperature, int64_t k,
             std::optional<double> top_p, std::optional<double> min_p) {
    const std::vector<float> maxima = maxima_of(kernels, logits, count);
    float highest = -std::numeric_limits<float>::infinity();
    for (const float each : maxima) {
        if (!(each < std::numeric_limits<float>::infinity())) return kNoNumbers;
        highest = std::max(highest, each);
    }
    if (highest == -std::numeric_limits<float>::infinity()) return kNoNumbers;
    const std::vector<int64_t> ids = largest_of(logits, count, k, maxima);
    const double most = logits[ids[0]];
    double sum = 0;
    std::vector<double> cumulative;
    cumulative.reserve(ids.size());
    // The difference first: a quotient can overflow.
    for (const int64_t id : ids) {
        const double share = std::exp((static_cast<double>(logits[id]) - most) / temperature);
        if (min_p && share < *min_p) break;  // the first one's is 1
        cumulative.push_back(sum += share);
    }
    auto end = cumulative.end();
    // Up to and with the one that takes the sum over the bar, so that at least one stays.
    if (top_p) end = std::min(std::lower_bound(cumulative.begin(), end, *top_p * sum) + 1, end);
    const auto drawn = std::min(std::upper_bound(cumulative.begin(), end, uniform * *(end - 1)), end - 1);
    return ids[static_cast<size_t>(drawn - cumulative.begin())];
}

void adjust(const float* logits, int64_t count, const Adjustment& how, float* out) {
    constexpr float kNever = -std::numeric_limits<float>::infinity();
    std::copy(logits, logits + count, out);
    for (size_t i = 0; i < how.biased.size(); ++i) {
        float& logit = out[how.biased[i]];
        logit = static_cast<float>(static_cast<double>(logit) + how.bias[i]);
    }
    for (size_t i = 0; i < how.seen.size(); ++i) {
        double logit = out[how.seen[i]];
        logit = logit > 0 ? logit / how.repetition : logit * how.repetition;
        if (how.counts[i] > 0) logit = logit - how.frequency * how.counts[i] - how.presence;
        out[how.seen[i]] = static_cast<float>(logit);
    }
    if (!how.allowed.empty()) {
        std::vector<float> kept;
        kept.reserve(how.allowed.size());
        for (const int32_t id : how.allowed) kept.push_back(out[id]);
        std::fill(out, out + count, kNever);
        for (size_t i = 0; i < kept.size(); ++i) out[how.allowed[i]] = kept[i];
    }
    for (const int32_t id : how.forbidden) out[id] = kNever;
}

double log_sum_exp(const float* x, int64_t count) {
    const double most = *std::max_element(x, x + count);
    if (most == -std::numeric_limits<double>::infinity()) return most;
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += std::exp(static_cast<double>(x[i]) - most);
    return most + std::log(sum);
}

}  // namespace nvtripy_portable

// Where the scales of integer weights come from: one for a row, applied at the end; one for every 128 weights; or one for
// each group of 32, which blocks of any other size are taken apart into.
#pragma once

#include "simd.h"

namespace nvtripy_portable::ISA {

enum class Scales { row, block, group };

// Which of a row's `count` scales, one for every `block` weights, is that of a group of 32. A shift, where it can be:
// divisions take longer than the products.
inline int64_t group_scale(int64_t group, int64_t block, int64_t count) {
    const bool is_power = (block & (block - 1)) == 0;
    return smaller(is_power ? group >> __builtin_ctzll(static_cast<uint64_t>(block / 32)) : group / (block / 32), count - 1);
}

}  // namespace nvtripy_portable::ISA

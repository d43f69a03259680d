// Where the scales of integer weights come from: one for a row, applied at the end; one for every 128 weights; or one for
// each group of 32, which blocks of any other size are taken apart into.
#pragma once

#include "simd.h"

namespace nvtripy_portable::ISA {

enum class Scales { row, block, group };

}  // namespace nvtripy_portable::ISA

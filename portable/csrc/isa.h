// Which instruction sets this CPU has, and the kernels for the best of them.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace nvtripy_portable {

// Names of the instruction sets that are compiled in and that this CPU has, the best first.
std::vector<std::string> available_isas();

// The same, and those that are chosen by their names only: amx-batch, and what plain code stands in for.
std::vector<std::string> testable_isas();

// The kernels for `name`, or for the best instruction set if it is empty. Throws std::invalid_argument.
const Kernels& kernels_for(const std::string& name);

}  // namespace nvtripy_portable

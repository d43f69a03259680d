// Which extensions of NEON this processor has.
#pragma once

namespace nvtripy_portable {

// dotprod multiplies bytes by twos of vectors (SDOT), i8mm as small matrices (SMMLA).
enum class ArmFeature : int { dotprod, i8mm };

// Asks the system, which knows of the processor and of itself. Nowhere but on Linux and macOS is there anything to ask.
bool has_arm_feature(ArmFeature feature);

}  // namespace nvtripy_portable

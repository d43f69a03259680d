// Whether this process may use the processor's tiles.
#pragma once

namespace nvtripy_portable {

// True where the processor has AMX with int8 and bfloat16, and the system lets this process, all threads of it, use the 8 KB of
// registers. It is asked once, at the first call.
bool may_use_amx();

}  // namespace nvtripy_portable

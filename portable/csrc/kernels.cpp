// The table of kernels for the instruction set that this file is being compiled for.
#include "kernels.h"

#include "attention.h"
#include "attention_tiles.h"
#include "input_stage.h"
#include "linear.h"
#include "low_rank.h"
#include "rows.h"
#if ISA_TILES
#include "amx_attention.h"
#include "amx_linear.h"
#endif

namespace nvtripy_portable::ISA {

#define ISA_STRING(name) ISA_STRING_OF(name)
#define ISA_STRING_OF(name) #name

#if ISA_TILES
template <bool kBatch>
constexpr Kernels with_tiles(const char* name) {
    return {name, kTokenGroup, kStreamedRows, kTileWeights, norm,
            prepared_floats_for_tiles<kBatch>, prepare_for_tiles<kBatch>, multiply_with_tiles<kBatch>, finish,
            low_rank, apply_gate, load_row, quantize, store_row, attend, attend_block_with_tiles, attend_group, turn, merge, divide,
            block_maxima, read};
}
#endif

extern const Kernels kernels;
#if ISA_TILES == 2
const Kernels kernels = with_tiles<true>("amx-emulated");
#elif ISA_TILES
const Kernels kernels = with_tiles<false>(ISA_STRING(ISA));
extern const Kernels batch_kernels;
const Kernels batch_kernels = with_tiles<true>("amx-batch");
#else
const Kernels kernels = {
    ISA_STRING(ISA), kPreparedTogether, kRowGroup, kPanelColumns, norm, prepared_floats, prepare_tokens, multiply, finish,
    low_rank, apply_gate, load_row, quantize, store_row, attend, attend_block, attend_group, turn, merge, divide, block_maxima, read,
};
#endif

}  // namespace nvtripy_portable::ISA

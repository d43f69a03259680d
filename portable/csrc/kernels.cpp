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

extern const Kernels kernels;
const Kernels kernels = {
#if ISA_TILES
    ISA_TILES == 2 ? "amx-emulated" : ISA_STRING(ISA), kTokenGroup, kStreamedRows, kTileWeights, norm,
    prepared_floats_for_tiles, prepare_for_tiles, multiply_with_tiles, finish,
#else
    ISA_STRING(ISA), kPreparedTogether, kRowGroup, kPanelColumns, norm, prepared_floats, prepare_tokens, multiply, finish,
#endif
    low_rank, apply_gate, load_row, quantize, store_row, attend,
#if ISA_TILES
    attend_block_with_tiles,
#else
    attend_block,
#endif
    attend_group, turn, merge, divide, block_maxima, read,
};

}  // namespace nvtripy_portable::ISA

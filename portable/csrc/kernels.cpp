// The table of kernels for the instruction set that this file is being compiled for.
#include "kernels.h"

#include "attention.h"
#include "attention_tiles.h"
#include "float_panels.h"
#include "input_stage.h"
#include "integer_panels.h"
#include "integer_products.h"
#include "products.h"
#include "rows.h"

namespace nvtripy_portable::ISA {

#define ISA_STRING(name) ISA_STRING_OF(name)
#define ISA_STRING_OF(name) #name

extern const Kernels kernels;
const Kernels kernels = {
    ISA_STRING(ISA), layer_norm, prepare, prepare_integers, products, integer_products,
    float_panels, integer_panels, prepare_panel_integers, finish,
    load_row, quantize, store_row, attend, attend_block, merge, divide, block_maxima, read,
};

}  // namespace nvtripy_portable::ISA

"""A checkpoint of any kind → one file for each of several processes, in TensorRT-LLM's checkpoint format.

    python convert_checkpoint.py --model-dir gpt2 --tp-size 2 --pp-size 2 --output-dir gpt2-4-ranks
    python convert_checkpoint.py --model-dir gpt2 --quant-mode int8-weight-only --tp-size 2 --output-dir gpt2-int8
    python example.py --model-type gpt2-4-ranks --input-text "Gravity is"

Every linear layer is shared by the `--tp-size` ranks of a stage, heads and the MLP's width being divided, and the
layers by `--pp-size` stages (parallelism/splitting.py says how each tensor is). The folder has config.json,
rank0.safetensors, ..., and the tokenizer; the loader reads it like any other checkpoint. It is written beside the one
that is asked for, which it becomes in the end.
"""

from __future__ import annotations

if __name__ == "__main__":
    import interrupt

    interrupt.end_quietly()

import argparse
import sys
from collections.abc import Sequence

import command_line
from command_line import EMBEDDED_CHECKPOINT
from conversion import PARAMETER_DTYPES
from converting.arguments import add_arguments, mapping_of
from converting.ranks import ConversionError, planned, write
from converting.weight_only import BITS
from output_folder import in_bytes
from weight_loader import CheckpointError, open_checkpoint

PROGRAM = "convert_checkpoint.py"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line.

    Raises:
        UsageError: an unknown option, or a value out of its range.
    """
    parser = command_line.Parser(PROGRAM, "Write a checkpoint's part for each of several processes.")
    parser.add_argument(
        *("--model-dir", "--model-type"),
        dest="model_type",
        metavar="NAME",
        default=EMBEDDED_CHECKPOINT,
        help="the checkpoint: anything that example.py takes (default: the embedded one)",
    )
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit at the hub")
    parser.add_argument(
        "--output-dir", metavar="DIR", type=command_line.path, required=True, help="a folder to be made"
    )
    add_arguments(parser)
    parser.add_argument(
        "--dtype",
        choices=("auto", *PARAMETER_DTYPES),
        default="auto",
        help="of what is not quantized (default: as it is stored)",
    )
    parser.add_argument(
        "--quant-mode",
        choices=BITS,
        help="round the weights of linear layers, with a scale for each output feature; one that is quantized already "
        "stays as it is",
    )
    return parser.parse_args(arguments)


def run(arguments: Sequence[str] | None = None) -> None:
    """Carries out the command line."""
    options = parse_arguments(arguments)
    mapping = mapping_of(options)
    checkpoint = open_checkpoint(options.model_type, options.revision)
    dtype = None if options.dtype == "auto" else options.dtype
    conversion = planned(checkpoint, mapping, dtype, options.quant_mode)
    size = write(conversion, options.output_dir)
    kind = conversion.dtype if conversion.algorithm is None else f"{conversion.algorithm} and {conversion.dtype}"
    command_line.report(
        f"{options.output_dir}: {mapping.world_size} ranks ({mapping.tp_size} x {mapping.pp_size}) in {kind}, "
        f"{in_bytes(size)}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit code."""
    return command_line.main(PROGRAM, lambda: run(arguments), CheckpointError, ConversionError, prints=False)


if __name__ == "__main__":
    sys.exit(main())

"""Says what a LoRA adapter changes, or merges it into its checkpoint and writes the sum as a HuggingFace folder.

    python lora.py show --model-type gpt2 --lora ./my-adapter
    python lora.py merge --model-type gpt2 --lora ./my-adapter --output gpt2-merged [--dtype float16]

The base is a checkpoint of any kind that is not quantized; the adapter is PEFT's folder, a name at the hub, or NeMo's
.nemo. The folder has config.json, model.safetensors and the tokenizer, and runs everywhere without the adapter. It is
written beside its target, which it becomes in the end. PyTorch and transformers (requirements/train.txt) write it.
"""

from __future__ import annotations

if __name__ == "__main__":
    import interrupt

    interrupt.end_quietly()

import math
import sys
from collections.abc import Sequence

import numpy as np

import command_line
from adapters.lora import Lora, locate_lora, read_lora
from adapters.merging import merge
from adapters.places import LINEARS
from command_line import UsageError
from conversion import PARAMETER_DTYPES
from quantizing.settings import QuantizationError
from weight_loader import CheckpointError, open_checkpoint

PROGRAM = "lora.py"


def summary(lora: Lora) -> str:
    """A line for each kind of layer that the adapter changes: its rank, and how much the weights change by it."""
    lines = [f"{'layer':<12}  {'rank':>4}  {'numbers':>10}  norm of the change"]
    for name, pair in zip(LINEARS, lora.matrices, strict=True):
        if pair is not None:
            down, up = pair
            # ‖up downᵀ‖² of each layer, by the small products alone.
            squares = np.einsum("lij,lij->", up @ up.transpose(0, 2, 1), down @ down.transpose(0, 2, 1))
            lines.append(f"{name:<12}  {down.shape[1]:4}  {down.size + up.size:10,}  {math.sqrt(max(squares, 0)):.4g}")
    return "\n".join(lines)


def run(arguments: Sequence[str] | None = None) -> None:
    """Carries out the command."""
    parser = command_line.Parser(PROGRAM, "Show a LoRA adapter, or merge it into its checkpoint.")
    parser.add_argument("command", choices=("show", "merge"), help="what to do")
    command_line.add_model_arguments(parser)
    parser.add_argument(
        "--lora", metavar="NAME", required=True, help="PEFT's folder, a name at the hub, or NeMo's .nemo file"
    )
    parser.add_argument("--output", metavar="DIR", type=command_line.path, help="the folder that merge writes")
    parser.add_argument(
        "--dtype", choices=PARAMETER_DTYPES, default="float32", help="of the merged weights (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if (options.command == "merge") != (options.output is not None):
        raise UsageError("expected --output with merge, and not with show")
    checkpoint = open_checkpoint(options.model_type, options.revision)
    if options.command == "show":
        print(summary(read_lora(locate_lora(options.lora), checkpoint)))
        return
    merge(checkpoint, locate_lora(options.lora), options.output, options.dtype)
    open_checkpoint(options.output)  # what it is compared with there is what it has to be
    size = sum(path.stat().st_size for path in options.output.glob("*.safetensors")) / 1e6
    command_line.report(f"wrote {options.output}: {options.dtype}, {size:.1f} MB")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after one line on standard error for input that cannot be used."""
    return command_line.main(PROGRAM, lambda: run(arguments), QuantizationError, CheckpointError)


if __name__ == "__main__":
    sys.exit(main())

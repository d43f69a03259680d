"""Merges a LoRA adapter into its checkpoint, and writes the sum as a HuggingFace folder.

    python lora.py merge --model-type gpt2 --lora ./my-adapter --output gpt2-merged [--dtype float16]

The base is a checkpoint of any kind that is not quantized; the adapter is PEFT's folder, a name at the hub, or NeMo's
.nemo. The folder has config.json, model.safetensors and the tokenizer, and runs everywhere without the adapter. It is
written beside its target, which it becomes in the end. PyTorch and transformers (requirements/train.txt) write it.
"""

from __future__ import annotations

if __name__ == "__main__":
    import interrupt

    interrupt.end_quietly()

import sys
from collections.abc import Sequence

import command_line
from adapters.lora import locate_lora
from adapters.merging import merge
from conversion import PARAMETER_DTYPES
from quantizing.settings import QuantizationError
from weight_loader import CheckpointError, open_checkpoint

PROGRAM = "lora.py"


def run(arguments: Sequence[str] | None = None) -> None:
    """Carries out the command."""
    parser = command_line.Parser(PROGRAM, "Merge a LoRA adapter into its checkpoint.")
    parser.add_argument("command", choices=("merge",), help="what to do")
    command_line.add_model_arguments(parser)
    parser.add_argument(
        "--lora", metavar="NAME", required=True, help="PEFT's folder, a name at the hub, or NeMo's .nemo file"
    )
    parser.add_argument("--output", metavar="DIR", type=command_line.path, required=True, help="the folder to write")
    parser.add_argument(
        "--dtype", choices=PARAMETER_DTYPES, default="float32", help="of the merged weights (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    checkpoint = open_checkpoint(options.model_type, options.revision)
    merge(checkpoint, locate_lora(options.lora), options.output, options.dtype)
    open_checkpoint(options.output)  # what it is compared with there is what it has to be
    size = sum(path.stat().st_size for path in options.output.glob("*.safetensors")) / 1e6
    command_line.report(f"wrote {options.output}: {options.dtype}, {size:.1f} MB")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after one line on standard error for input that cannot be used."""
    return command_line.main(PROGRAM, lambda: run(arguments), QuantizationError, CheckpointError, prints=False)


if __name__ == "__main__":
    sys.exit(main())

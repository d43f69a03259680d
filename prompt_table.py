"""Converts prompt tables: PEFT's folders and NeMo's archives → one file, and says which tasks there are.

    python prompt_table.py show email.nemo
    python prompt_table.py convert email.nemo squad.nemo --output prompts.npy

The tasks of all inputs are numbered in their order. An output that ends in .npy is TensorRT-LLM's (tasks, tokens,
width), float32, in which shorter prompts end in zeros; one that ends in .safetensors keeps the tasks' names and
lengths.
"""

from __future__ import annotations

if __name__ == "__main__":
    import interrupt

    interrupt.end_quietly()

import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save

import command_line
from adapters.lora import locate_lora
from adapters.prompts import Prompt, read_prompts
from command_line import UsageError
from weight_loader import CheckpointError
from whole_file import written_whole

PROGRAM = "prompt_table.py"
SUFFIXES = (".npy", ".safetensors")


def summary(prompts: Sequence[Prompt]) -> str:
    """A line for each task: number, name, tokens and width."""
    lines = [f"{'task':>4}  {'tokens':>6}  {'width':>5}  name"]
    for number, each in enumerate(prompts):
        tokens, width = each.rows.shape
        lines.append(f"{number:4}  {tokens:6}  {width:5}  {'-' if each.name is None else each.name}")
    return "\n".join(lines)


def content_of(prompts: Sequence[Prompt], suffix: str) -> bytes:
    """The file that holds the prompts, which have one width."""
    if suffix == ".safetensors":
        return save({f"{n}.{each.name or ''}": np.ascontiguousarray(each.rows) for n, each in enumerate(prompts)})
    longest, width = max(len(each.rows) for each in prompts), prompts[0].rows.shape[1]
    table = np.zeros((len(prompts), longest, width), np.float32)
    for padded, each in zip(table, prompts, strict=True):
        padded[: len(each.rows)] = each.rows
    buffer = io.BytesIO()
    np.save(buffer, table)
    return buffer.getvalue()


def write(path: Path, content: bytes) -> None:
    """Writes a file, all of it or nothing.

    Raises:
        UsageError: it cannot be written.
    """
    with written_whole(path) as partial:
        partial.write_bytes(content)


def run(arguments: Sequence[str] | None = None) -> None:
    """Carries out the command."""
    parser = command_line.Parser(PROGRAM, "Show or convert prompt tables.")
    parser.add_argument("command", choices=("show", "convert"), help="what to do")
    parser.add_argument(
        "tables", metavar="NAME", nargs="+", help="PEFT's folders, .nemo, .npy or .safetensors files, or hub names"
    )
    parser.add_argument("--output", metavar="FILE", type=command_line.path, help=f"one that ends in {SUFFIXES}")
    options = parser.parse_args(arguments)
    if (options.command == "convert") != (options.output is not None):
        raise UsageError("expected --output with convert, and not with show")
    if options.output is not None and options.output.suffix not in SUFFIXES:
        raise UsageError(f"expected --output to end in {' or '.join(SUFFIXES)} but got {options.output}")
    prompts = [prompt for name in options.tables for prompt in read_prompts(locate_lora(name))]
    widths = sorted({each.rows.shape[1] for each in prompts})
    if len(widths) > 1:
        raise UsageError(f"expected prompts of one width but got {' and '.join(map(str, widths))}")
    if options.output is not None:
        write(options.output, content_of(prompts, options.output.suffix))
        command_line.report(f"wrote {options.output}: {len(prompts)} task{'' if len(prompts) == 1 else 's'}")
    print(summary(prompts))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after one line on standard error for input that cannot be used."""
    return command_line.main(PROGRAM, lambda: run(arguments), CheckpointError)


if __name__ == "__main__":
    sys.exit(main())

"""Perplexity after rounding to nearest and after GPTQ, at 8, 4 and 3 bits: mean and spread over several checkpoints.

    python benchmarks/rounding.py --model-type out-seed1 out-seed2 out-seed3 --data held-out.txt --calib-data train.txt

Checkpoints that differ by their training's seed alone say how far a difference between two methods can be told from
chance; of a single checkpoint several calibration texts say the same of the calibration only. Each pair of a checkpoint
and a calibration text is a run. Everything is computed by the portable runtime, from the folders that quantization.py
writes (and keeps in its cache), in float16. The table, in Markdown, goes to standard output.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import nvtripy as tp

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    import interrupt

    interrupt.end_quietly()

import command_line  # noqa: E402
import quantization  # noqa: E402
import quantizing.settings  # noqa: E402
from command_line import UsageError  # noqa: E402
from engine import config_of, load_model  # noqa: E402
from evaluation.perplexity import nats_of, perplexity  # noqa: E402
from evaluation.text import encode, read_text  # noqa: E402
from evaluation.variants import Variant  # noqa: E402
from quantization import QuantizationConfig, QuantizationError  # noqa: E402
from weight_loader import Checkpoint, CheckpointError, open_checkpoint  # noqa: E402


@dataclass(frozen=True)
class Row:
    """A grid, and each run's perplexity over the unquantized model's, by method."""

    bits: int
    group_size: int | None
    clipping: bool
    ratios: dict[str, list[float]]

    @property
    def grid(self) -> list[str]:
        group = "output feature" if self.group_size is None else f"{self.group_size} inputs"
        scales = "searched" if self.clipping else "span the largest weight"
        return [f"int{self.bits}", group, scales]

    def cells(self) -> list[str]:
        rtn, gptq = self.ratios["rtn"], self.ratios["gptq"]
        gains = [a - b for a, b in zip(rtn, gptq, strict=True)]
        return [*self.grid, *(_with_spread(each) for each in (rtn, gptq, gains))]


COLUMNS = ("", "a scale for", "scales", "rtn", "gptq", "rtn - gptq")


def _with_spread(values: Sequence[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{spread} %"


def measure(checkpoint: Checkpoint, ids: np.ndarray, stride: int, name: str) -> float:
    """The perplexity of a checkpoint on a text."""
    gpt = load_model(checkpoint, config_of(checkpoint, "float16"))
    context = checkpoint.config.n_positions
    try:
        return perplexity(nats_of(gpt, ids, context, min(stride, context), name))
    except tp.TripyException as error:
        raise UsageError(f"{checkpoint.path} cannot be compiled: {str(error).strip().splitlines()[-1]}") from None


def run(options: argparse.Namespace) -> None:
    """Carries out the command."""
    text, name = read_text(options.data, options.max_tokens)
    checkpoints = [open_checkpoint(Path(folder)) for folder in options.model_type]
    tokens = encode(text, name, options.max_tokens, [(Variant(str(each.path)), each) for each in checkpoints])
    floats = {}
    for each in checkpoints:
        floats[each.path] = measure(each, tokens[each.path].ids, options.stride, str(each.path))
        command_line.report(f"{each.path}: {floats[each.path]:.4f}")
    texts: list[str | None] = options.calib_data or [None]
    grids = [
        (bits, group, clipping) for bits in options.bits for group in options.group_size for clipping in (False, True)
    ]
    rows = []
    for bits, group_size, clipping in grids:
        if bits == 8 and group_size:
            continue
        row = Row(bits, group_size or None, clipping, {"rtn": [], "gptq": []})
        for (method, ratios), each, calib_data in itertools.product(row.ratios.items(), checkpoints, texts):
            config = QuantizationConfig(
                method=method,
                bits=bits,
                group_size=row.group_size,
                clipping=clipping,
                calib_data=calib_data,
                calib_size=options.calib_size,
            )
            folder = quantization.cached_checkpoint(each, config, report=command_line.report)
            found = measure(open_checkpoint(folder), tokens[each.path].ids, options.stride, folder.name)
            ratios.append(found / floats[each.path] - 1)
            grid = ", ".join(row.grid)
            command_line.report(f"{each.path}, {method}, {grid}: {100 * ratios[-1]:+.3f} %")
        rows.append(row)
    unquantized = ", ".join(f"{each:.3f}" for each in floats.values())
    print(f"{name}, {len(next(iter(tokens.values())).ids)} tokens. Perplexity unquantized: {unquantized}.")
    print(f"Above it, of {len(checkpoints)} checkpoints and {len(texts)} calibration texts:\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{':---|' * 3}{'---:|' * 3}")
    for row in rows:
        print(f"| {' | '.join(row.cells())} |")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_line.Parser("rounding.py", "Compare rounding to nearest and GPTQ.")
    parser.add_argument("--model-type", metavar="DIR", nargs="+", default=[command_line.EMBEDDED_CHECKPOINT])
    parser.add_argument(
        "--data", metavar="FILE", help="to evaluate on (default: the embedded checkpoint's held-out text)"
    )
    parser.add_argument("--max-tokens", metavar="N", type=int, default=0, help="of its start; 0: all (default)")
    parser.add_argument(
        "--stride", metavar="N", type=int, default=128, help="from window to window (default %(default)s)"
    )
    parser.add_argument("--calib-data", metavar="FILE", nargs="+", help="texts to calibrate on")
    parser.add_argument("--calib-size", metavar="N", type=int, default=quantizing.settings.CALIB_SIZE)
    parser.add_argument("--bits", metavar="N", type=int, nargs="+", default=[8, 4, 3])
    parser.add_argument(
        "--group-size", metavar="N", type=int, nargs="+", default=[0], help="0: a scale an output feature (default)"
    )
    options = parser.parse_args(arguments)
    command_line.check_range(options, max_tokens=(0, None), stride=(1, None), calib_size=(1, None))
    if options.max_tokens == 1:
        raise UsageError("expected --max-tokens to be at least 2, or 0 for all, but got 1")
    return options


if __name__ == "__main__":
    sys.exit(command_line.main("rounding.py", lambda: run(parse_arguments()), QuantizationError, CheckpointError))

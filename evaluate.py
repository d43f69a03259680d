"""Compares variants of a GPT-2: perplexity, speed, size and memory, as a table and a picture.

    python evaluate.py --variants float32 float16 int8-weight-only int4-weight-only+lm-head+kv-int8 --plot variants.png

A variant is words joined by "+": a data type, a quantization mode (in float16, unless a data type is joined), and what
else is quantized; or the folder of a checkpoint. The first one is what the others are compared with. The table goes to
standard output, everything else to standard error.

The way of the data: text → token ids; for each variant a checkpoint (quantized and kept by quantization.py) → the
compiled stateless model → negative log-likelihoods → perplexity, and the compiled cached model, saved → a fresh process
that opens it and generates → speed and peak memory.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np

import command_line
import machine
import picture
import quantization
from command_line import UsageError
from evaluation import chart
from evaluation.perplexity import negative_log_likelihoods, perplexity, stateless_model, windows
from evaluation.speed import measure_speed, run_apart
from evaluation.table import FORMATS, Result, Settings
from evaluation.variants import DEFAULT_DTYPES, WORDS, Variant, open_default, open_variants, parse_variant
from evaluation.weights import compiled_weight_bytes, stored_weight_bytes
from quantization import QuantizationConfig, QuantizationError
from weight_loader import Checkpoint, CheckpointError, open_checkpoint

ROOT = Path(__file__).resolve().parent
HELD_OUT_TEXT = command_line.EMBEDDED_CHECKPOINT / "held-out.txt"
REQUIREMENTS = ROOT / "requirements-evaluate.txt"
PROMPT_TOKENS = 32  # of the speed run, or half of the context where that is shorter


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as it can be without a checkpoint.

    Raises:
        UsageError: an unknown option or variant, or a value out of its range.
    """
    parser = command_line.Parser("evaluate.py", "Compare variants of a GPT-2: perplexity, speed, size, memory.")
    command_line.add_model_arguments(parser)
    parser.add_argument(
        "--variants",
        metavar="V",
        nargs="+",
        help=f"words of {', '.join(WORDS)}, joined by '+'; or a checkpoint folder (default: {' '.join(DEFAULT_DTYPES)} "
        "and, as far as they can be had, the quantization modes)",
    )
    parser.add_argument(
        "--data",
        metavar="FILE|DATASET",
        help="a UTF-8 text, or a data set at the hub (default: what the embedded checkpoint was not trained on)",
    )
    parser.add_argument(
        "--max-tokens",
        metavar="N",
        type=int,
        default=16384,
        help="of the text's start; 0: all of it (default %(default)s)",
    )
    parser.add_argument("--context", metavar="N", type=int, help="tokens of a window (default: the model's context)")
    parser.add_argument(
        "--stride", metavar="N", type=int, help="tokens from one window to the next (default: half the window)"
    )
    parser.add_argument(
        "--new-tokens", metavar="N", type=int, default=128, help="generated to measure speed (default %(default)s)"
    )
    parser.add_argument(
        "--runs",
        metavar="N",
        type=int,
        default=3,
        help="of the speed measurement; the median counts (default %(default)s)",
    )
    parser.add_argument("--format", choices=tuple(FORMATS), default="text", help="of the table (default %(default)s)")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="perplexity against size as a .png or .svg picture")
    calibration = parser.add_argument_group("calibration of quantized variants, as in quantization.py")
    calibration.add_argument("--calib-data", metavar="FILE|DATASET")
    calibration.add_argument("--calib-size", metavar="N", type=int, default=quantization.CALIB_SIZE)
    calibration.add_argument("--calib-length", metavar="N", type=int)
    options = parser.parse_args(arguments)
    command_line.check_least(options, max_tokens=0, context=1, stride=1, new_tokens=2, runs=1)
    if options.max_tokens == 1:
        raise UsageError("expected --max-tokens to be at least 2, or 0 for all, but got 1")
    options.calibration = {name: getattr(options, name) for name in ("calib_data", "calib_size", "calib_length")}
    options.parsed_variants = [parse_variant(text, options.calibration) for text in options.variants or ()]
    return options


def read_text(data: str | None, max_tokens: int) -> tuple[str, str]:
    """The text to evaluate on, and its name.

    Raises:
        UsageError: there is none, or it is not text.
    """
    # Of a data set as many documents as are sure to do; what is too much is cut off as tokens.
    documents = max(32, max_tokens // 64) if max_tokens else 1 << 16
    source = QuantizationConfig(
        mode=quantization.MODES[0], calib_data=str(HELD_OUT_TEXT) if data is None else data, calib_size=documents
    )
    try:
        text, name = quantization.calibration_text(source)
    except QuantizationError as error:
        message = str(error).replace("the calibration text", "the text").replace(" to calibrate on", "")
        raise UsageError(message) from None
    return text, HELD_OUT_TEXT.relative_to(ROOT).as_posix() if data is None else name


def encode(text: str, name: str, max_tokens: int, variants: Sequence[tuple[Variant, Checkpoint]]) -> np.ndarray:
    """Token ids of the text, (tokens,) int32.

    Raises:
        UsageError: there are not two of them, or two variants' tokenizers disagree on them.
        CheckpointError: a tokenizer cannot be used.
    """
    from tokenizer import load_tokenizer

    found: dict[Path, np.ndarray] = {}
    for variant, checkpoint in variants:
        if checkpoint.path in found:
            continue
        tokenizer = load_tokenizer(checkpoint.path, checkpoint.config.vocab_size)
        ids = np.array(tokenizer.encode(text)[: max_tokens or None], dtype=np.int32)
        first = found.setdefault(checkpoint.path, ids) if not found else next(iter(found.values()))
        if not np.array_equal(first, ids):
            raise UsageError(
                f"expected variants with the same tokenizer but {variant.name} and {variants[0][0].name} differ"
            )
        found[checkpoint.path] = ids
    ids = next(iter(found.values()))
    if len(ids) < 2:
        raise UsageError(f"expected a text of at least 2 tokens but {name} has {len(ids)}")
    return ids


def settle(options: argparse.Namespace, text: str, ids: np.ndarray, checkpoints: Sequence[Checkpoint]) -> Settings:
    """The settings, what was left open in the options filled in.

    Raises:
        UsageError: a window that is longer than a variant's context, or a stride that is longer than the window.
    """
    longest = min(checkpoint.config.n_positions for checkpoint in checkpoints)
    context = options.context or longest
    if context > longest:
        raise UsageError(f"expected --context to be at most the model's context of {longest} but got {context}")
    stride = options.stride or max(1, context // 2)
    if stride > context:
        raise UsageError(f"expected --stride to be at most the window of {context} tokens but got {stride}")
    prompt = min(PROMPT_TOKENS, max(1, longest // 2), len(ids))
    return Settings(
        text=text,
        tokens=len(ids),
        context=min(context, len(ids) - 1),
        stride=stride,
        prompt_tokens=prompt,
        new_tokens=min(options.new_tokens, longest - prompt + 1),
        runs=options.runs,
        machine=machine.processor(),
        cores=machine.usable_cores(),
        nvtripy=metadata.version("nvtripy"),
    )


def evaluate(variant: Variant, checkpoint: Checkpoint, ids: np.ndarray, settings: Settings) -> Result:
    """Measures one variant; its ratio is left at 1.

    Raises:
        CheckpointError: its weights cannot be loaded.
        UsageError: nvtripy cannot compile it.
    """
    import nvtripy as tp

    from engine import compile_model, config_of, load_model
    from nvtripy_portable import engine_file

    config = config_of(checkpoint, variant.dtype)
    try:
        gpt = load_model(checkpoint, config)
        with tempfile.TemporaryDirectory() as folder:
            executable = compile_model(gpt, 1)
            memory = compiled_weight_bytes(executable, checkpoint.config)
            file = str(Path(folder) / "engine")
            engine_file.save(executable, file)
            del executable
            prompt = ids[: settings.prompt_tokens].tolist()
            speed = run_apart(measure_speed, file, config, prompt, settings.new_tokens, settings.runs)
        num_windows = sum(1 for _ in windows(len(ids) - 1, settings.context, settings.stride))
        logits_of, batch = stateless_model(gpt, settings.context, num_windows)
    except tp.TripyException as error:
        raise UsageError(f"variant {variant.name} cannot be compiled: {str(error).strip().splitlines()[-1]}") from None
    nats = negative_log_likelihoods(logits_of, batch, ids, settings.context, settings.stride, variant.name)
    return Result(variant.name, variant.dtype, perplexity(nats), 1.0, speed, stored_weight_bytes(checkpoint), memory)


def run(options: argparse.Namespace) -> None:
    """Carries out the command."""
    if options.plot is not None:
        picture.check(options.plot, REQUIREMENTS.name)
    text, name = read_text(options.data, options.max_tokens)
    source = open_checkpoint(options.model_type, options.revision)
    variants = (
        open_variants(options.parsed_variants, source)
        if options.parsed_variants
        else open_default(source, options.calibration)
    )
    ids = encode(text, name, options.max_tokens, variants)
    settings = settle(options, name, ids, [checkpoint for _, checkpoint in variants])
    results: list[Result] = []
    for number, (variant, checkpoint) in enumerate(variants, 1):
        command_line.report(f"{variant.name} ({number} of {len(variants)})")
        result = evaluate(variant, checkpoint, ids, settings)
        first = results[0].perplexity if results else result.perplexity
        results.append(replace(result, ratio=result.perplexity / first))
    print(FORMATS[options.format](settings, results), flush=True)
    if options.plot is not None:
        chart.draw(settings, results, options.plot)


def main() -> int:
    """Exit code 0, or 2 after one line on standard error for input that cannot be used."""
    return command_line.main("evaluate.py", lambda: run(parse_arguments()), CheckpointError, QuantizationError)


if __name__ == "__main__":
    sys.exit(main())

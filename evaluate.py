"""Compares variants of a GPT-2: perplexity, speed, size and memory, as a table and a picture.

    python evaluate.py --variants float32 float16 int8-weight-only int4-weight-only+lm-head+kv-int8 --plot variants.png

A variant is words joined by "+": a data type, a quantization mode (in float16, unless a data type is joined), and what
else is quantized; or the folder of any checkpoint, to which words may be joined, too. The first one is what the others
are compared with. Checkpoints with other tokenizers compare by the bits that they need for a byte of the text. The
table goes to standard output, everything else to standard error.

The way of the data: text → token ids; for each variant a checkpoint (quantized and kept by quantization.py) → the
compiled stateless model → negative log-likelihoods → perplexity, and the compiled cached model, saved → a fresh process
that opens it and generates → speed and peak memory.
"""

from __future__ import annotations

if __name__ == "__main__":
    import interrupt

    interrupt.end_quietly()

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np

import command_line
import machine
import picture
import quantization
import quantizing.settings
from command_line import UsageError
from evaluation import chart
from evaluation.perplexity import bits_per_byte, nats_of, perplexity, ratio
from evaluation.speed import measure_speed, run_apart
from evaluation.table import FORMATS, Result, Settings
from evaluation.text import Tokens, encode, read_text
from evaluation.variants import Variant, add_variants_argument, open_available, open_variants, parse_variant
from evaluation.weights import compiled_weight_bytes, stored_weight_bytes
from generation import LogitsError
from quantization import QuantizationError
from weight_loader import Checkpoint, CheckpointError, open_checkpoint

REQUIREMENTS = "requirements/evaluate.txt"
DEFAULT_VARIANTS = ("float32", "float16", *quantization.MODES)
PROMPT_TOKENS = 32  # of the speed run, or half of the context where that is shorter


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as it can be without a checkpoint.

    Raises:
        UsageError: an unknown option or variant, or a value out of its range.
    """
    parser = command_line.Parser("evaluate.py", "Compare variants of a GPT-2: perplexity, speed, size, memory.")
    command_line.add_model_arguments(parser)
    add_variants_argument(parser, DEFAULT_VARIANTS)
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
    parser.add_argument("--plot", metavar="FILE", type=command_line.path, help="perplexity as a .png or .svg picture")
    parser.add_argument(
        "--plot-against", choices=chart.AXES, default="bits", help="of a weight, or the weights' size (default bits)"
    )
    calibration = parser.add_argument_group("calibration of quantized variants, as in quantization.py")
    calibration.add_argument("--calib-data", metavar="FILE|DATASET")
    calibration.add_argument("--calib-size", metavar="N", type=int, default=quantizing.settings.CALIB_SIZE)
    calibration.add_argument("--calib-length", metavar="N", type=int)
    options = parser.parse_args(arguments)
    command_line.check_range(
        options, max_tokens=(0, None), context=(1, None), stride=(1, None), new_tokens=(2, None), runs=(1, None)
    )
    if options.max_tokens == 1:
        raise UsageError("expected --max-tokens to be at least 2, or 0 for all, but got 1")
    options.calibration = {name: getattr(options, name) for name in ("calib_data", "calib_size", "calib_length")}
    options.parsed_variants = [parse_variant(text, options.calibration) for text in options.variants or ()]
    return options


def settle(
    options: argparse.Namespace, text: str, tokens: Mapping[Path, Tokens], checkpoints: Sequence[Checkpoint]
) -> Settings:
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
    first, *others = tokens.values()
    lengths = [len(each.ids) for each in (first, *others)]
    prompt = min(PROMPT_TOKENS, max(1, longest // 2), *lengths)
    return Settings(
        text=text,
        tokens=len(first.ids),
        bytes=len(first.predicted),
        is_one_tokenizer=all(np.array_equal(first.ids, other.ids) for other in others),
        context=min(context, max(lengths) - 1),
        stride=stride,
        prompt_tokens=prompt,
        new_tokens=min(options.new_tokens, longest - prompt + 1),
        runs=options.runs,
        machine=machine.processor(),
        cores=machine.usable_cores(),
        nvtripy=metadata.version("nvtripy"),
    )


def evaluate(variant: Variant, checkpoint: Checkpoint, tokens: Tokens, settings: Settings) -> Result:
    """Measures one variant; its ratio is left open.

    Raises:
        CheckpointError: its weights cannot be loaded.
        UsageError: nvtripy cannot compile it, what it computes are no numbers, or the environment asks for what the
            runtime does not have.
    """
    import nvtripy as tp

    from engine import EngineError, compile_model, config_of, load_model
    from nvtripy_portable import engine_file

    config = config_of(checkpoint, variant.dtype)
    try:
        gpt = load_model(checkpoint, config)
        with tempfile.TemporaryDirectory() as folder:
            executable = compile_model(gpt, 1)
            memory = compiled_weight_bytes(executable, checkpoint.config)
            file = str(Path(folder) / "engine")
            try:
                engine_file.save(executable, file)
            except OSError as error:
                raise UsageError(f"cannot save the engine to {file}: {error.strerror or error}") from None
            del executable
            prompt = tokens.ids[: settings.prompt_tokens].tolist()
            speed = run_apart(measure_speed, file, config, prompt, settings.new_tokens, settings.runs)
        nats = nats_of(gpt, tokens.ids, settings.context, settings.stride, variant.name)
    except EngineError as error:
        raise UsageError(str(error)) from None
    except tp.TripyException as error:
        raise UsageError(f"variant {variant.name} cannot be compiled: {str(error).strip().splitlines()[-1]}") from None
    except LogitsError as error:
        raise UsageError(f"variant {variant.name}: {error}") from None
    return Result(
        variant=variant.name,
        dtype=variant.dtype,
        perplexity=perplexity(nats),
        ratio=None,
        bits_per_byte=bits_per_byte(nats, tokens.predicted),
        speed=speed,
        disk=stored_weight_bytes(checkpoint),
        memory=memory,
    )


def run(options: argparse.Namespace) -> None:
    """Carries out the command."""
    if options.plot is not None:
        picture.check(options.plot, REQUIREMENTS)
    text, name = read_text(options.data, options.max_tokens)
    source = open_checkpoint(options.model_type, options.revision)
    variants = (
        open_variants(options.parsed_variants, source)
        if options.parsed_variants
        else open_available(DEFAULT_VARIANTS, source, options.calibration)
    )
    tokens = encode(text, name, options.max_tokens, variants)
    settings = settle(options, name, tokens, [checkpoint for _, checkpoint in variants])
    compared = next(iter(tokens.values()))
    results: list[Result] = []
    for number, (variant, checkpoint) in enumerate(variants, 1):
        command_line.report(f"{variant.name} ({number} of {len(variants)})")
        own = tokens[checkpoint.path]
        result = evaluate(variant, checkpoint, own, settings)
        if np.array_equal(own.ids, compared.ids):
            first = results[0].perplexity if results else result.perplexity
            result = replace(result, ratio=ratio(result.perplexity, first))
        results.append(result)
    print(FORMATS[options.format](settings, results), flush=True)
    if options.plot is not None:
        chart.draw(settings, results, options.plot, options.plot_against)


def main() -> int:
    """Exit code 0, or 2 after one line on standard error for input that cannot be used."""
    return command_line.main("evaluate.py", lambda: run(parse_arguments()), CheckpointError, QuantizationError)


if __name__ == "__main__":
    sys.exit(main())

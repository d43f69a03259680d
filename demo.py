"""A local web page on which several variants of a GPT-2 answer the same prompt side by side.

    python demo.py --variants float16 rtn-int4 gptq-int4

Each variant's answer streams into a card of its own, under its speed, its size in memory and its perplexity on a text.
The perplexity is measured once and kept. The variants are named as for evaluate.py. The page is served to this machine
only, unless --host says otherwise, and needs no network.

The way of the data: variants → a checkpoint each → compiled (or a saved engine opened) and measured → the page.
"""

from __future__ import annotations

if __name__ == "__main__":
    import interrupt

    interrupt.end_quietly()

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import command_line
import engine_cache
import machine
from command_line import UsageError
from engine_cache import EngineError, EngineFolder
from evaluation.facts import Facts, facts_of
from evaluation.text import Tokens, encode, read_text
from evaluation.variants import Variant, add_variants_argument, open_available, open_variants, parse_variant
from quantization import QuantizationError
from web.proxies import no_proxies
from web.side_by_side import Comparison, Model
from weight_loader import Checkpoint, CheckpointError, open_checkpoint

DEFAULT_VARIANTS = ("float16", "rtn-int4", "gptq-int4")
PORT = 7860
REQUIREMENTS = "requirements/demo.txt"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as it can be without a checkpoint.

    Raises:
        UsageError: an unknown option or variant, or a value out of its range.
    """
    parser = command_line.Parser("demo.py", "Several variants of a GPT-2 on a local web page, side by side.")
    command_line.add_model_arguments(parser)
    add_variants_argument(parser, DEFAULT_VARIANTS)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: for other machines, too (default %(default)s)")
    parser.add_argument("--port", metavar="N", type=int, default=PORT, help="(default %(default)s)")
    parser.add_argument(
        "--data",
        metavar="FILE|DATASET",
        help="the text for perplexity (default: what the embedded checkpoint was not trained on)",
    )
    parser.add_argument(
        "--max-tokens", metavar="N", type=int, default=8192, help="of its start; 0: all of it (default %(default)s)"
    )
    command_line.add_engine_arguments(parser)
    options = parser.parse_args(arguments)
    command_line.check_range(options, max_tokens=(0, None), port=(1, 65535))
    if options.max_tokens == 1:
        raise UsageError("expected --max-tokens to be at least 2, or 0 for all, but got 1")
    options.parsed_variants = [parse_variant(text) for text in options.variants or ()]
    names = [variant.name for variant in options.parsed_variants]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"expected each variant once but got {name!r} {names.count(name)} times")
    return options


def check_server(host: str, port: int) -> None:
    """Proves, before any long work, that the page can be served.

    Raises:
        UsageError: Gradio is not installed, or the port cannot be had.
    """
    # Gradio, and what it imports, calls nobody; it looks at these when it is imported.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        with no_proxies():
            import gradio  # noqa: F401
    except ImportError as error:
        raise UsageError(f"the page needs gradio ({error}): pip install -r {REQUIREMENTS}") from None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not what is only waiting to be forgotten
            probe.bind(address)
    except (OSError, UnicodeError) as error:  # UnicodeError: no name of a machine can be like that
        reason = (error.strerror or error) if isinstance(error, OSError) else "no such name"
        raise UsageError(f"cannot serve at {host}:{port}: {reason} (--port and --host choose another)") from None


def prepare(
    variant: Variant, checkpoint: Checkpoint, tokens: Tokens, engines: EngineFolder | None
) -> tuple[Model, Facts]:
    """A variant, compiled and measured; the engine and the measurements are kept for the next time.

    Raises:
        CheckpointError: its weights or its tokenizer cannot be used.
        UsageError: nvtripy cannot compile it, or it cannot be kept where the user wants it.
    """
    import nvtripy as tp

    from engine import open_engine
    from tokenizer import load_tokenizer

    try:
        engine = open_engine(checkpoint, variant.dtype, 1, engines)
        if engines is not None:
            engines.save_pending()
        facts = facts_of(variant, checkpoint, tokens, engine.executable, machine.cache_folder() / "measured")
    except EngineError as error:
        raise UsageError(str(error)) from None
    except tp.TripyException as error:
        raise UsageError(f"variant {variant.name} cannot be compiled: {str(error).strip().splitlines()[-1]}") from None
    tokenizer = load_tokenizer(checkpoint.tokenizer_source, checkpoint.config.vocab_size)
    return Model(variant.name, engine, tokenizer, checkpoint.config.eos_token_ids), facts


def run(options: argparse.Namespace) -> None:
    """Carries out the command: returns when the page is ended."""
    from tqdm import tqdm

    check_server(options.host, options.port)
    from web import page

    text, name = read_text(options.data, options.max_tokens)
    source = open_checkpoint(options.model_type, options.revision)
    if options.parsed_variants:
        variants = open_variants(options.parsed_variants, source)
    else:
        variants = open_available(DEFAULT_VARIANTS, source, {})
    tokens = encode(text, name, options.max_tokens, variants)
    engines = engine_cache.chosen(options, lambda message: tqdm.write(f"demo.py: {message}", file=sys.stderr))
    models, facts = [], []
    with tqdm(variants, unit="variant", file=sys.stderr, leave=False) as progress:
        for variant, checkpoint in progress:
            progress.set_description(f"compiling and measuring {variant.name}")
            model, known = prepare(variant, checkpoint, tokens[checkpoint.path], engines)
            models.append(model)
            facts.append(known)
    first = next(iter(tokens.values()))
    about = (
        f"One prompt, {len(models)} variants of {Path(options.model_type).name}, the same seed. They take "
        f"turns, and a clock runs while its model has the machine: {machine.processor()}, {machine.usable_cores()} "
        f"cores. Perplexity: on {len(first.predicted):,} bytes of {name}."
    )
    context = max(checkpoint.config.n_positions for _, checkpoint in variants)
    page.serve(page.build(Comparison(models), facts, about, context), options.host, options.port)


def main() -> int:
    """Exit code 0, or 2 after one line on standard error for input that cannot be used."""
    return command_line.main(
        "demo.py", lambda: run(parse_arguments()), CheckpointError, QuantizationError, prints=False
    )


if __name__ == "__main__":
    sys.exit(main())

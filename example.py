"""Generates text with a GPT-2: parse → load (or quantize, once) → compile (or open a saved engine) → generate → print.

    python example.py --input-text "What is the answer to life, the universe, and everything?" --seed=1
    python example.py --input-text "What is the answer?" --seed=1 --quant-mode int8-weight-only

The text goes to standard output, everything else to standard error.
"""

from __future__ import annotations

if __name__ == "__main__":
    import interrupt

    interrupt.end_quietly()

import argparse
import itertools
import os
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import command_line
import engine_cache
import generation
import machine
import quantization
import text_file
from command_line import UsageError
from engine_cache import EngineError, EngineFolder
from quantization import QuantizationConfig, QuantizationError
from response import Response, encode_prompt
from weight_loader import Checkpoint, CheckpointError, open_checkpoint

if TYPE_CHECKING:
    from engine import Engine
    from tokenizer import Tokenizer

MAX_BATCH = 8  # responses computed together; more are computed one batch after another
SEPARATOR = "-" * 16  # between responses, where there are several


@dataclass
class Timing:
    """Wall-clock moments of a run, in seconds, for ``--verbose``."""

    started: float = field(default_factory=time.perf_counter)
    loaded: float = 0.0
    compiled: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0
    tokens: int = 0

    def report(self) -> str:
        decoding = self.finished - self.first_token
        rate = f"{(self.tokens - 1) / decoding:.1f} tokens/s" if self.tokens > 1 and decoding > 0 else "no rate"
        return (
            f"load {self.loaded - self.started:.2f} s, compile or open {self.compiled - self.loaded:.2f} s, "
            f"first token after {self.first_token - self.compiled:.3f} s, "
            f"{self.tokens} token{'' if self.tokens == 1 else 's'}, {rate}, "
            f"peak memory {machine.peak_memory_bytes() / (1 << 20):.0f} MB"
        )


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as it can be without a checkpoint.

    Raises:
        UsageError, QuantizationError: an unknown option, or a value out of its range.
    """
    parser = command_line.Parser("example.py", "Generate text with a GPT-2.")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--input-text", metavar="TEXT", help="the prompt (default: what standard input holds)")
    source.add_argument("--batch", metavar="FILE", type=command_line.path, help="prompts from a UTF-8 file, one a line")
    command_line.add_model_arguments(parser)
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=200, help="at most so many (default %(default)s)"
    )
    parser.add_argument("--seed", metavar="N", type=int, help="same seed, same text (default: a new one each time)")
    parser.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        default=0.8,
        help="divides the logits; 0 picks the most likely token (default %(default)s)",
    )
    parser.add_argument(
        "--top-k", metavar="K", type=int, default=5, help="sample among the K likeliest; 0: all (default %(default)s)"
    )
    parser.add_argument("--top-p", metavar="P", type=float, help="nucleus sampling (default: off)")
    parser.add_argument(
        "--num-samples", metavar="N", type=int, default=1, help="responses to each prompt (default %(default)s)"
    )
    parser.add_argument("--stream", action="store_true", help="print the text as it is generated")
    parser.add_argument("--stop", metavar="TEXT", action="append", default=[], help="end before this text (repeatable)")
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        default="float16",
        help="of weights and activations (default %(default)s)",
    )
    quantization.add_arguments(parser.add_argument_group("quantization"))
    command_line.add_engine_arguments(parser)
    parser.add_argument(
        "--threads", metavar="N", type=int, help="of the portable runtime (default: the cores that it may use)"
    )
    parser.add_argument("--verbose", action="store_true", help="times and memory, on standard error")
    options = parser.parse_args(arguments)
    options.quantization = quantization.config_from(options) if quantization.is_asked_for(options) else None
    command_line.check_range(
        options,
        max_new_tokens=(1, None),
        num_samples=(1, None),
        top_k=(0, None),
        threads=(1, command_line.MAX_THREADS),
    )
    if "" in options.stop:
        raise UsageError("expected --stop to be a text but got an empty one")
    for name, text in [("input-text", options.input_text or ""), *(("stop", stop) for stop in options.stop)]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # Python hands over bytes that are not UTF-8 as lone surrogates
            raise UsageError(f"expected --{name} to be UTF-8 text") from None
    if options.seed is None:
        options.seed = int.from_bytes(os.urandom(4), "little")
    try:
        generation.Sampler(options.seed, 0, options.temperature, options.top_k or None, options.top_p)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return options


def read_prompts(options: argparse.Namespace) -> list[str]:
    """The prompts, none of them empty.

    Raises:
        UsageError: there is none, one is empty, or they are not text.
    """
    source = str(options.batch or "standard input")
    try:
        if options.batch is not None:
            # Not splitlines, which would also cut at a form feed or U+2028 within a prompt.
            prompts = _without_line_end(text_file.read_text(options.batch)).split("\n")
            if prompts == [""]:
                raise UsageError(f"expected a prompt on each line of {source} but the file is empty")
        elif options.input_text is not None:
            prompts = [options.input_text]
        elif sys.stdin is None:
            raise UsageError("expected a prompt: standard input is closed, and there is no --input-text and no --batch")
        else:
            if sys.stdin.isatty():
                print("Reading the prompt from standard input; end it with Ctrl-D.", file=sys.stderr)
            prompts = [_without_line_end(text_file.decode_text(sys.stdin.buffer.read(), source))]
    except OSError as error:
        raise UsageError(f"cannot read {source}: {error.strerror}") from None
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            where = f" on line {number} of {options.batch}" if options.batch else ""
            raise UsageError(f"expected a prompt but got an empty one{where}")
    return prompts


def _without_line_end(text: str) -> str:
    """A text whose last line may have an end; a lone carriage return at the very end is one, too."""
    return text.removesuffix("\n").removesuffix("\r")


def quantized(checkpoint: Checkpoint, config: QuantizationConfig) -> Checkpoint:
    """The checkpoint quantized as asked: itself if it is so already, else one from the cache, or a new one.

    Raises:
        UsageError: it is quantized, but otherwise.
        QuantizationError: it cannot be quantized.
    """
    found = checkpoint.config
    if found.quant_mode is None and found.kv_cache_dtype is None:
        return open_checkpoint(quantization.cached_checkpoint(checkpoint, config, report=command_line.report))
    has = _described(found.quant_mode, found.kv_cache_dtype)
    asked = _described(config.mode, None if config.kv_cache_dtype == "float16" else config.kv_cache_dtype)
    if has != asked:
        raise UsageError(f"expected a checkpoint to quantize, or one with {asked}, but {checkpoint.path} has {has}")
    return checkpoint


def _described(mode: str | None, kv_cache_dtype: str | None) -> str:
    parts = [f"{mode} layers"] if mode else []
    return " and ".join([*parts, *([f"an {kv_cache_dtype} KV cache"] if kv_cache_dtype else [])])


@dataclass(frozen=True)
class Job:
    """One response to be made: to which prompt, and the how-manieth to it."""

    prompt: str
    ids: list[int]
    sample: int


def respond(
    engine: Engine,
    tokenizer: Tokenizer,
    jobs: Sequence[Job],
    options: argparse.Namespace,
    eos_ids: Collection[int],
    timing: Timing,
) -> Iterator[tuple[int, str]]:
    """Generates for up to ``engine.batch`` jobs together.

    Yields:
        (index of the job, text): the responses in pieces, as soon as they are certain.
    """
    responses = [Response(tokenizer, options.stop, eos_ids) for _ in jobs]
    samplers = [
        generation.Sampler(options.seed, job.sample, options.temperature, options.top_k or None, options.top_p)
        for job in jobs
    ]
    done: set[int] = set()
    for drawn in generation.generate(engine, [job.ids for job in jobs], samplers, options.max_new_tokens, done):
        timing.first_token = timing.first_token or time.perf_counter()
        timing.tokens += len(drawn)
        for row, token in drawn:
            yield row, responses[row].push(token)
            if responses[row].is_done:
                done.add(row)
    for row, response in enumerate(responses):
        yield row, response.finish()


def saving(engines: EngineFolder | None, pieces: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """The pieces of responses. Once there are any, a new engine is saved beside the work on the others."""
    for piece in pieces:
        yield piece
        if engines is not None:
            engines.save_pending(wait=False)


def run(options: argparse.Namespace) -> None:
    """Carries out the command."""
    prompts = read_prompts(options)
    timing = Timing()
    checkpoint = open_checkpoint(options.model_type, options.revision)
    from tokenizer import load_tokenizer

    tokenizer = load_tokenizer(checkpoint.tokenizer_source, checkpoint.config.vocab_size)
    encoded = [encode_prompt(prompt, tokenizer, checkpoint.config.n_positions) for prompt in prompts]
    if options.quantization is not None:
        checkpoint = quantized(checkpoint, options.quantization)
    timing.loaded = time.perf_counter()

    if options.threads is not None:
        os.environ["NVTRIPY_PORTABLE_THREADS"] = str(options.threads)  # which the runtime reads when it is first used
    # These import nvtripy, which takes a moment: only once the input is known to be good.
    from engine import open_engine

    jobs = (
        Job(prompt, ids, sample)
        for prompt, ids in zip(prompts, encoded, strict=True)
        for sample in range(options.num_samples)
    )
    batch = 1 if options.stream else min(len(prompts) * options.num_samples, MAX_BATCH)
    report = command_line.report if options.verbose else _ignore
    engines = engine_cache.chosen(options, lambda message: command_line.report(f"example.py: {message}"))
    try:
        engine = open_engine(checkpoint, options.dtype, batch, engines, report)
    except EngineError as error:
        raise UsageError(str(error)) from None
    eos_ids = checkpoint.config.eos_token_ids
    del checkpoint
    timing.compiled = time.perf_counter()

    is_first = True
    while group := list(itertools.islice(jobs, batch)):
        pieces = saving(engines, respond(engine, tokenizer, group, options, eos_ids, timing))
        if not is_first:
            print(SEPARATOR)
        is_first = False
        if options.stream:
            print(group[0].prompt, end="", flush=True)
            for _, piece in pieces:
                print(piece, end="", flush=True)
            print()
        else:
            texts = [job.prompt for job in group]
            for row, piece in pieces:
                texts[row] += piece
            print(f"\n{SEPARATOR}\n".join(texts), flush=True)
    timing.finished = time.perf_counter()
    if engines is not None:
        engines.save_pending()
    if options.verbose:
        command_line.report(timing.report())


def _ignore(message: str) -> None:
    pass


def main() -> int:
    """Exit code 0, or 2 after one line on standard error for input that cannot be used."""
    return command_line.main(
        "example.py", lambda: run(parse_arguments()), CheckpointError, QuantizationError, generation.LogitsError
    )


if __name__ == "__main__":
    sys.exit(main())

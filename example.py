"""Generates text with a GPT-2: parse → load (or quantize, once) → compile (or open a saved engine) → generate → print.

    python example.py --input-text "What is the answer to life, the universe, and everything?" --seed=1
    python example.py --input-text "What is the answer?" --seed=1 --quant-mode int8-weight-only
    python example.py --batch prompts.jsonl --jsonl --output answers.jsonl

The text goes to standard output, everything else to standard error.
"""

from __future__ import annotations

if __name__ == "__main__":
    import interrupt

    interrupt.end_quietly()

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import command_line
import engine_cache
import generation
import machine
import quantization
import text_file
from command_line import UsageError
from engine_cache import EngineError, EngineFolder
from quantization import QuantizationConfig, QuantizationError
from response import Response
from serving import searching
from serving.jobs import JobFile, Jobs, Prompts, Request
from serving.settings import SamplingSettings
from weight_loader import Checkpoint, CheckpointConfig, CheckpointError, open_checkpoint

if TYPE_CHECKING:
    from engine import Engine
    from serving.offline import OfflineEngine
    from tokenizer import Tokenizer

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
        first = f"first token after {self.first_token - self.compiled:.3f} s, " if self.tokens else ""
        return (
            f"load {self.loaded - self.started:.2f} s, compile or open {self.compiled - self.loaded:.2f} s, {first}"
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
        help="divides the logits; 0 picks the most likely token (default 0.8)",
    )
    parser.add_argument("--top-k", metavar="K", type=int, help="sample among the K likeliest; 0: all (default 5)")
    parser.add_argument("--top-p", metavar="P", type=float, help="nucleus sampling (default: off)")
    parser.add_argument(
        "--num-samples", metavar="N", type=int, default=1, help="responses to each prompt (default %(default)s)"
    )
    search = parser.add_argument_group("beam search")
    searching.add_arguments(search)
    search.add_argument(
        "--num-return-sequences", metavar="M", type=int, help="of the N texts, the best ones (default 1)"
    )
    parser.add_argument("--stream", action="store_true", help="print the text as it is generated")
    parser.add_argument(
        "--jsonl", action="store_true", help="--batch has JSON objects, one a line, and so have the results"
    )
    parser.add_argument(
        "--output", metavar="FILE", type=command_line.path, help="of --jsonl: a new file (default: standard output)"
    )
    parser.add_argument(
        "--speculate", metavar="prompt-lookup|NAME", help="guess tokens by lookup in the text, or by a smaller model"
    )
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
        num_return_sequences=(1, None),
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
    if options.jsonl and options.batch is None:
        raise UsageError("expected --batch with --jsonl: it names the file")
    if options.jsonl and options.stream:
        raise UsageError("expected --jsonl or --stream but got both")
    if options.output is not None and not options.jsonl:
        raise UsageError("expected --jsonl with --output: a text goes to standard output")
    settle_drawing(options)
    options.has_seed = options.seed is not None
    if not options.has_seed:
        options.seed = int.from_bytes(os.urandom(4), "little")
    try:
        generation.Sampler(options.seed, 0, options.temperature, options.top_k or None, options.top_p)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return options


def settle_drawing(options: argparse.Namespace) -> None:
    """Whether texts are drawn or searched for, and how many of them.

    Raises:
        UsageError: options that do not go together.
    """
    options.beams = searching.beams_of(options)
    if options.beams is None:
        if options.num_return_sequences is not None:
            raise UsageError("expected --num-beams with --num-return-sequences")
        options.temperature = 0.8 if options.temperature is None else options.temperature
        options.top_k = 5 if options.top_k is None else options.top_k
        return
    for name in ("temperature", "top_k", "top_p", "stop", "stream", "speculate"):
        if getattr(options, name):  # of temperature and top-k 0 changes nothing
            raise UsageError(f"expected --num-beams or --{name.replace('_', '-')} but got both")
    if options.num_samples != 1:
        raise UsageError("expected --num-return-sequences with --num-beams but got --num-samples")
    options.temperature, options.num_samples = 0.0, options.num_return_sequences or 1
    if options.num_samples > options.beams.beams:
        raise UsageError(
            f"expected --num-return-sequences to be at most --num-beams ({options.beams.beams}) but got "
            f"{options.num_samples}"
        )


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


@dataclass
class Model:
    """A checkpoint, and what it takes to compute with it.

    Attributes:
        checkpoint: Until it is compiled: its files stay open as long as it lives.
        config: The checkpoint's settings.
        draft: The smaller model that guesses tokens, if one does.
        engines: Where compiled engines are kept.
        report: Takes lines for whoever wants to know more.
    """

    checkpoint: Checkpoint
    config: CheckpointConfig
    tokenizer: Tokenizer
    draft: Checkpoint | None
    engines: EngineFolder | None
    report: Callable[[str], None]
    timing: Timing

    def requests(self, jobs: Jobs, start: int = 0) -> Iterator[Request]:
        """The requests of jobs, from number ``start`` on."""
        return jobs.requests(self.tokenizer, self.config.n_positions, self.config.vocab_size, start)


def find_jobs(options: argparse.Namespace) -> Prompts | JobFile:
    """What is to be answered.

    Raises:
        UsageError: it cannot be read, or its results have no place.
    """
    usual = SamplingSettings(
        seed=options.seed,
        temperature=options.temperature,
        top_k=options.top_k or None,
        top_p=options.top_p,
        max_tokens=options.max_new_tokens,
        stop=tuple(options.stop),
        beams=options.beams,
    )
    if not options.jsonl:
        return Prompts(read_prompts(options), usual, options.num_samples, options.batch)
    if options.output is not None:
        from serving.results import check_new

        check_new(options.output)
    return JobFile(options.batch, usual, options.num_samples)


def find_model(options: argparse.Namespace, jobs: Prompts | JobFile, timing: Timing) -> Model:
    """The checkpoint, quantized if it is to be, and not compiled yet. What is wrong with the jobs is said before."""
    checkpoint = open_checkpoint(options.model_type, options.revision)
    from tokenizer import load_tokenizer

    context, vocabulary = checkpoint.config.n_positions, checkpoint.config.vocab_size
    tokenizer = load_tokenizer(checkpoint.tokenizer_source, vocabulary)
    draft = None
    if options.speculate is not None:
        from serving.opening import open_draft

        draft = open_draft(options.speculate, checkpoint, tokenizer)
    if isinstance(jobs, JobFile):
        with progress(jobs.size, "B", desc="checking", unit_scale=True) as bar:
            jobs.check(tokenizer, context, vocabulary, bar.update)
    else:
        jobs.check(tokenizer, context, vocabulary)
    if options.quantization is not None:
        checkpoint = quantized(checkpoint, options.quantization)
    timing.loaded = time.perf_counter()
    if options.threads is not None:
        os.environ["NVTRIPY_PORTABLE_THREADS"] = str(options.threads)  # which the runtime reads when it is first used
    engines = engine_cache.chosen(options, lambda message: command_line.report(f"example.py: {message}"))
    report = command_line.report if options.verbose else _ignore
    return Model(checkpoint, checkpoint.config, tokenizer, draft, engines, report, timing)


def answer_one(jobs: Prompts, model: Model, options: argparse.Namespace) -> None:
    """Prints the only response to the only prompt: the shortest way from one token to the next."""
    # This imports nvtripy, which takes a moment: only once the input is known to be good.
    from engine import open_engine

    engine = open_engine(model.checkpoint, options.dtype, 1, model.engines, model.report)
    del model.checkpoint
    model.timing.compiled = time.perf_counter()
    [request] = model.requests(jobs)
    print_texts([(request.prompt, saving(model, respond(engine, request.ids, model, options)))], options.stream)


def respond(engine: Engine, ids: list[int], model: Model, options: argparse.Namespace) -> Iterator[str]:
    """A response in pieces, as soon as they are certain."""
    response = Response(model.tokenizer, options.stop, model.config.eos_token_ids)
    sampler = generation.Sampler(options.seed, 0, options.temperature, options.top_k or None, options.top_p)
    timing, done = model.timing, set[int]()
    for drawn in generation.generate(engine, [ids], [sampler], options.max_new_tokens, done):
        timing.first_token = timing.first_token or time.perf_counter()
        timing.tokens += len(drawn)
        for row, token in drawn:
            yield response.push(token)
            if response.is_done:
                done.add(row)
    yield response.finish()


def answer_all(jobs: Prompts, model: Model, options: argparse.Namespace) -> None:
    """Prints any number of responses to any number of prompts, computed together."""
    offline = open_offline(jobs, model, options)
    answers = offline.answers(model.requests(jobs))
    texts = ((answer.request.prompt, saving(model, answer.pieces())) for answer in answers)
    if options.stream:
        print_texts(texts, is_streamed=True)
    else:
        with progress(jobs.answers, "answer") as bar:
            print_texts(texts, is_streamed=False, bar=bar)
    tell_counts(offline, model)


def answer_file(jobs: JobFile, model: Model, options: argparse.Namespace) -> None:
    """Writes the results of each request of a file.

    Raises:
        UsageError: some ended in an error.
    """
    from serving.results import open_results, results_of

    identity = {"model": model.checkpoint.fingerprint(), "endings": list(model.config.eos_token_ids)}
    identity["dtype"] = options.dtype
    offline = open_offline(jobs, model, options)
    results = open_results(options.output, jobs, identity, options.has_seed)
    with progress(jobs.count, "prompt", initial=results.done) as bar:
        for result in results_of(offline.answers(model.requests(jobs, results.done))):
            with bar.external_write_mode(file=sys.stdout):
                results.write(result)
            bar.update()
            if model.engines is not None:
                model.engines.save_pending(wait=False)
    results.finish()
    tell_counts(offline, model)
    if results.errors:
        raise UsageError(f"{results.errors} of {results.done} prompts ended in an error, which their results tell")


def open_offline(jobs: Jobs, model: Model, options: argparse.Namespace) -> OfflineEngine:
    """The model, compiled, for so many answers."""
    from serving.offline import MAX_SEQUENCES, OfflineEngine
    from serving.opening import open_model, open_speculation

    together = min(jobs.sequences, MAX_SEQUENCES)
    opened = open_model(model.checkpoint, options.dtype, together, None, model.engines, model.report, jobs.beams)
    speculation = open_speculation(options.speculate, model.draft, options.dtype, model.engines, model.report)
    del model.checkpoint, model.draft
    model.timing.compiled = time.perf_counter()
    return OfflineEngine(opened, model.tokenizer, model.config.eos_token_ids, together, speculation)


def tell_counts(offline: OfflineEngine, model: Model) -> None:
    """For --verbose."""
    counters = offline.counters
    model.timing.first_token, model.timing.tokens = offline.first_token, counters.generated_tokens
    if counters.drafted_tokens:
        model.report(f"{counters.accepted_tokens} of {counters.drafted_tokens} guesses were right")


def saving(model: Model, pieces: Iterator[str]) -> Iterator[str]:
    """The pieces of a response. Once there are any, a new engine is saved beside the work on the others."""
    for piece in pieces:
        yield piece
        if model.engines is not None:
            model.engines.save_pending(wait=False)


def print_texts(texts: Iterable[tuple[str, Iterator[str]]], is_streamed: bool, bar: Any = None) -> None:
    """Prints prompts with their responses, set apart where there are several.

    Args:
        texts: Prompts, each with its response in pieces, which are asked for before the next prompt.
        bar: Is told of each response, and makes way for its text.
    """
    for number, (prompt, pieces) in enumerate(texts):
        separator = f"{SEPARATOR}\n" if number else ""
        if is_streamed:
            print(separator + prompt, end="", flush=True)
            for piece in pieces:
                print(piece, end="", flush=True)
            print()
            continue
        text = prompt + "".join(pieces)
        with contextlib.nullcontext() if bar is None else bar.external_write_mode(file=sys.stdout):
            print(separator + text, flush=True)
        if bar is not None:
            bar.update()


def progress(total: int, unit: str, **settings: Any) -> Any:
    """A bar on standard error, where that is a terminal."""
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, leave=False, file=sys.stderr, disable=None, **settings)


def run(options: argparse.Namespace) -> None:
    """Carries out the command."""
    jobs = find_jobs(options)
    timing = Timing()
    model = find_model(options, jobs, timing)
    try:
        if isinstance(jobs, JobFile):
            answer_file(jobs, model, options)
        elif jobs.answers == 1 and options.speculate is None and options.beams is None:
            answer_one(jobs, model, options)
        else:
            answer_all(jobs, model, options)
    except EngineError as error:
        raise UsageError(str(error)) from None
    timing.finished = time.perf_counter()
    if model.engines is not None:
        model.engines.save_pending()
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

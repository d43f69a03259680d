"""Generates text with a GPT-2: parse → load (or quantize, once) → compile (or open a saved engine) → generate → print.

    python example.py --input-text "What is the answer to life, the universe, and everything?" --seed=1
    python example.py --input-text "What is the answer?" --seed=1 --quant-mode int8-weight-only
    python example.py --batch prompts.jsonl --jsonl --output answers.jsonl
    mpirun -np 2 python example.py --input-text "What is the answer?" --seed=1 --tp-size 2

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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import command_line
import engine_cache
import generation
import machine
import quantization
from command_line import UsageError
from engine_cache import EngineError, EngineFolder
from generation_options import find_jobs, parse_arguments
from parallelism import launcher
from quantization import QuantizationConfig, QuantizationError
from response import Response
from serving.jobs import JobFile, Jobs, Prompts, Request
from weight_loader import Checkpoint, CheckpointConfig, CheckpointError, open_checkpoint

if TYPE_CHECKING:
    from adapters.lora import Lora
    from adapters.prompts import PromptTable
    from engine import Engine
    from parallelism.mapping import Mapping
    from parallelism.team import Team
    from serving.offline import OfflineEngine
    from tokenizer import Tokenizer

UNUSABLE = (CheckpointError, QuantizationError, generation.LogitsError)  # input that is
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
        loras: Adapters, by their numbers.
        prompts: Virtual tokens of tasks.
        engines: Where compiled engines are kept.
        report: Takes lines for whoever wants to know more.
        team: The ranks that share the model, of which this one leads.
    """

    checkpoint: Checkpoint
    config: CheckpointConfig
    tokenizer: Tokenizer
    draft: Checkpoint | None
    loras: list[Lora]
    prompts: PromptTable | None
    engines: EngineFolder | None
    report: Callable[[str], None]
    timing: Timing
    team: Team | None = None

    @property
    def mapping(self) -> Mapping | None:
        return None if self.team is None else self.team.mapping

    def requests(self, jobs: Jobs, start: int = 0) -> Iterator[Request]:
        """The requests of jobs, from number ``start`` on."""
        return jobs.requests(self.tokenizer, self.config.n_positions, self.config.vocab_size, start)


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
    loras = []
    if options.lora:
        from adapters.lora import find_lora

        loras = [find_lora(name, checkpoint) for name in options.lora]
    prompts = None
    if options.prompt_table:
        from adapters.prompts import PromptTable, find_prompts

        found = [each for name in options.prompt_table for each in find_prompts(name, checkpoint)]
        prompts = PromptTable(found, vocabulary)
        jobs.tasks = [prompts.ids(number) for number in range(len(found))]
    if isinstance(jobs, JobFile):
        with progress(jobs.size, "B", desc="checking", unit_scale=True) as bar:
            jobs.check(tokenizer, context, vocabulary, bar.update)
    else:
        jobs.check(tokenizer, context, vocabulary)
    if options.quantization is not None:
        checkpoint = quantized(checkpoint, options.quantization)
    if loras:
        from adapters.folding import folded_scales

        folded = folded_scales(checkpoint)
        loras = [each.unfolded(folded) for each in loras]
    timing.loaded = time.perf_counter()
    if options.threads is not None:
        os.environ["NVTRIPY_PORTABLE_THREADS"] = str(options.threads)  # which the runtime reads when it is first used
    engines = engine_cache.chosen(options, lambda message: command_line.report(f"example.py: {message}"))
    report = command_line.report if options.verbose else _ignore
    return Model(checkpoint, checkpoint.config, tokenizer, draft, loras, prompts, engines, report, timing)


def answer_one(jobs: Prompts, model: Model, options: argparse.Namespace) -> None:
    """Prints the only response to the only prompt: the shortest way from one token to the next."""
    # This imports nvtripy, which takes a moment: only once the input is known to be good.
    from engine import open_engine

    agree_on(model, options, None)
    engine = open_engine(model.checkpoint, options.dtype, 1, model.engines, model.report, mapping=model.mapping)
    lead(model, engine.decoder)
    del model.checkpoint
    model.timing.compiled = time.perf_counter()
    [request] = model.requests(jobs)
    print_texts([(request.prompt, saving(model, respond(engine, request.ids, model, options)))], options.stream)


def agree_on(model: Model, options: argparse.Namespace, sequences: int | None, beams: int = 1) -> None:
    """Tells the other ranks, where there are any, what is to be done."""
    if model.team is not None:
        from parallelism.following import Plan, agree

        plan = model.team.share(Plan(str(model.checkpoint.path.absolute()), sequences, beams))
        agree(model.team, model.checkpoint, options.dtype, plan)


def lead(model: Model, decoder: object) -> None:
    """From here on the other ranks, where there are any, take the decoder's steps along with it."""
    if model.team is not None:
        from parallelism.following import shared

        model.team.lead(shared(decoder))


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
    identity |= {"dtype": options.dtype, "adapters": [each.digest for each in model.loras]}
    if model.prompts is not None:
        identity["prompts"] = model.prompts.digest
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
    from engine import room_of
    from serving.adapters import Adapter
    from serving.offline import MAX_SEQUENCES, OfflineEngine
    from serving.opening import open_model, open_speculation

    together = min(jobs.sequences, MAX_SEQUENCES)
    room = room_of(model.loras, 0 if model.prompts is None else len(model.prompts.rows))
    agree_on(model, options, together, jobs.beams)
    opened = open_model(
        model.checkpoint,
        options.dtype,
        together,
        None,
        model.engines,
        model.report,
        room,
        jobs.beams,
        model.mapping,
    )
    lead(model, opened.decoder)
    adapters = [Adapter(each.name, each.tables(room.ranks)) for each in model.loras] if room is not None else []
    if model.prompts is not None:
        opened.decoder.set_prompts(model.prompts.rows)
    speculation = open_speculation(options.speculate, model.draft, options.dtype, model.engines, model.report)
    del model.checkpoint, model.draft
    model.timing.compiled = time.perf_counter()
    return OfflineEngine(opened, model.tokenizer, model.config.eos_token_ids, together, speculation, adapters)


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
    """Carries out the command, alone or with other ranks."""
    if options.tp_size == 1:
        launcher.check_alone()
        return answer(options, None)
    from parallelism.team import guarded, team_of

    team = team_of(options.tp_size, options.embedding_sharding_dim, options.rank_timeout, "example.py")
    with guarded(team, *UNUSABLE, EngineError):
        options.threads = options.threads or team.threads
        if team.is_leader:
            answer(options, team)
            team.dismiss()
        else:
            from parallelism.following import follow

            follow(team, options, engine_cache.chosen(options, _ignore), _ignore)


def answer(options: argparse.Namespace, team: Team | None) -> None:
    """Does what the command asks for."""
    jobs = find_jobs(options)
    timing = Timing()
    model = find_model(options, jobs, timing)
    model.team = team
    try:
        if isinstance(jobs, JobFile):
            answer_file(jobs, model, options)
        elif jobs.answers == 1 and not (options.speculate or options.beams or options.lora or options.prompt_table):
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

    def command() -> None:
        with launcher.one_voice():
            run(parse_arguments())

    return command_line.main("example.py", command, *UNUSABLE)


if __name__ == "__main__":
    sys.exit(main())

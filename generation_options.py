"""The command line of example.py: what it may say, what goes together, and what it asks for."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import command_line
import generation
import quantization
import text_file
from command_line import UsageError
from serving import searching
from serving.jobs import NO_ADAPTER, JobFile, Prompts, described_adapters
from serving.settings import SamplingSettings


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
    parser.add_argument(
        "--lora", metavar="NAME", nargs="+", default=[], help="PEFT's adapters, numbered from 0: folders, or hub names"
    )
    parser.add_argument(
        "--lora-task-ids", metavar="N", nargs="+", type=int, help="each prompt's adapter; -1: none (default: the one)"
    )
    parser.add_argument(
        "--prompt-table", metavar="NAME", nargs="+", default=[], help="prompts of virtual tokens, by tasks from 0 on"
    )
    parser.add_argument(
        "--prompt-tasks", metavar="N", nargs="+", type=int, help="each prompt's task; -1: none (default: the one)"
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
    ranks = parser.add_argument_group("several processes")
    ranks.add_argument(
        "--tp-size", metavar="N", type=int, default=1, help="share each layer among N processes that mpirun has started"
    )
    ranks.add_argument(
        "--use-parallel-embedding", action="store_true", help="share the embeddings, too (default: each has them whole)"
    )
    ranks.add_argument(
        "--embedding-sharding-dim", metavar="0|1", type=int, choices=(0, 1), help="by rows (0, default) or columns (1)"
    )
    ranks.add_argument(
        "--rank-timeout",
        metavar="S",
        type=int,
        default=60,
        help="end the job when a process is silent for S seconds (default %(default)s)",
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
        tp_size=(1, None),
        rank_timeout=(1, None),
    )
    check_ranks(options)
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
    check_adapters(options)
    if options.jsonl and options.prompt_tasks is not None:
        raise UsageError("expected --prompt-tasks without --jsonl: its lines have prompt_task")
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


def check_ranks(options: argparse.Namespace) -> None:
    """Refuses what processes that share a model cannot do.

    Raises:
        UsageError: see above.
    """
    if options.tp_size == 1:
        for name in ("use_parallel_embedding", "embedding_sharding_dim"):
            if getattr(options, name) not in (False, None):
                raise UsageError(f"expected --tp-size of at least 2 with --{name.replace('_', '-')}")
        return
    if options.embedding_sharding_dim is not None and not options.use_parallel_embedding:
        raise UsageError("expected --use-parallel-embedding with --embedding-sharding-dim")
    if options.use_parallel_embedding and options.embedding_sharding_dim is None:
        options.embedding_sharding_dim = 0
    for name in ("lora", "prompt_table"):
        if getattr(options, name):
            raise UsageError(f"expected --tp-size or --{name.replace('_', '-')} but got both")


def check_adapters(options: argparse.Namespace) -> None:
    """Refuses numbers that no adapter has.

    Raises:
        UsageError: see above.
    """
    ids, count = options.lora_task_ids, len(options.lora)
    if ids is None:
        if count > 1 and not options.jsonl:
            raise UsageError(f"expected --lora-task-ids with {count} adapters: the number of each prompt's, or -1")
        return
    if options.jsonl:
        raise UsageError("expected --lora-task-ids without --jsonl: its lines have lora_task_id")
    for each in ids:
        if not NO_ADAPTER <= each < count:
            raise UsageError(f"expected --lora-task-ids to be {described_adapters(count)} but got {each}")


def one_each(option: str, numbers: list[int], prompts: int) -> list[int]:
    """The number of each prompt.

    Raises:
        UsageError: there are not as many numbers as prompts, nor one for all.
    """
    if len(numbers) not in (1, prompts):
        raise UsageError(f"expected {option} to be one number, or {prompts}, one a prompt, but got {len(numbers)}")
    return list(numbers) * (prompts if len(numbers) == 1 else 1)


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
        prompts = read_prompts(options)
        adapters = options.lora_task_ids or [0 if options.lora else NO_ADAPTER]
        tasks = options.prompt_tasks
        return Prompts(
            prompts,
            usual,
            options.num_samples,
            options.batch,
            one_each("--lora-task-ids", adapters, len(prompts)),
            None if tasks is None else one_each("--prompt-tasks", tasks, len(prompts)),
        )
    if options.output is not None:
        from serving.results import check_new

        check_new(options.output)
    return JobFile(options.batch, usual, options.num_samples, len(options.lora))

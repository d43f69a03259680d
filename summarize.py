"""Lets a GPT-2 summarize articles, and says how near it comes to what people wrote: ROUGE, latency, tokens/s.

    python summarize.py --model-type gpt2-medium --max-articles 20 --num-beams 4 --test-hf
    python summarize.py --data tests/summaries.jsonl --max-new-tokens 40 --rouge1-threshold 5

An article and "TL;DR:" are the prompt; what the model says then is its summary (Radford et al. 2019, section 3.6). The
table goes to standard output, everything else to standard error.

The way of the data: articles → prompts → the scheduler that serves → summaries → ROUGE; and the same prompts →
transformers, beside it.
"""

from __future__ import annotations

if __name__ == "__main__":
    import interrupt

    interrupt.end_quietly()

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import command_line
import engine_cache
import quantization
from command_line import UsageError
from engine_cache import EngineError
from example import progress, quantized
from generation import LogitsError
from quantization import QuantizationError
from serving import searching
from serving.jobs import Request
from serving.results import check_new
from serving.settings import BeamSettings, SamplingSettings
from summarizing.articles import HUB_DATASET, Article, prompt_of, read_articles
from summarizing.peer import Peer
from summarizing.rouge import Rouge, mean
from summarizing.table import Result, table
from weight_loader import Checkpoint, CheckpointError, open_checkpoint

if TYPE_CHECKING:
    from tokenizer import Tokenizer

INPUT_TOKENS = 923  # with 100 of the summary all but one of GPT-2's context


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as it can be without a checkpoint.

    Raises:
        UsageError, QuantizationError: an unknown option, or a value out of its range.
    """
    parser = command_line.Parser("summarize.py", "Let a GPT-2 summarize articles, and score it by ROUGE.")
    command_line.add_model_arguments(parser)
    parser.add_argument(
        "--data",
        metavar="FILE",
        type=command_line.path,
        help=f'JSON lines with "article" and "highlights" (default: {HUB_DATASET}\'s test split from the hub)',
    )
    parser.add_argument(
        "--max-articles", metavar="N", type=int, default=20, help="the first ones (default %(default)s)"
    )
    parser.add_argument(
        "--max-input-tokens",
        metavar="N",
        type=int,
        default=INPUT_TOKENS,
        help="of an article and its TL;DR:, no more than the context has room for (default %(default)s)",
    )
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=100, help="of a summary (default %(default)s)"
    )
    searching.add_arguments(parser.add_argument_group("beam search"))
    parser.add_argument(
        "--batch-size", metavar="N", type=int, default=8, help="articles computed together (default %(default)s)"
    )
    parser.add_argument("--test-hf", action="store_true", help="the same by transformers, for comparison")
    parser.add_argument(
        "--rouge1-threshold", metavar="X", type=float, help="exit code 1 where ROUGE-1 of the best beam is below"
    )
    parser.add_argument(
        "--output", metavar="FILE", type=command_line.path, help="the summaries, as JSON lines: a new file"
    )
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
    options = parser.parse_args(arguments)
    options.quantization = quantization.config_from(options) if quantization.is_asked_for(options) else None
    command_line.check_range(
        options,
        max_articles=(1, None),
        max_input_tokens=(1, None),
        max_new_tokens=(1, None),
        batch_size=(1, 64),
        threads=(1, command_line.MAX_THREADS),
    )
    options.beams = searching.beams_of(options) or BeamSettings(1)
    if options.rouge1_threshold is not None and not 0 <= options.rouge1_threshold <= 100:
        raise UsageError(f"expected --rouge1-threshold to be 0 to 100 but got {options.rouge1_threshold}")
    return options


def prompts_of(articles: Sequence[Article], checkpoint: Checkpoint, options: argparse.Namespace) -> list[list[int]]:
    """The prompts, as long as they may be.

    Raises:
        UsageError: the context has no room for a summary, or an article has what the vocabulary lacks.
    """
    from tokenizer import load_tokenizer

    context = checkpoint.config.n_positions
    if options.max_new_tokens >= context:
        raise UsageError(
            f"expected --max-new-tokens to be less than the model's context of {context} but got "
            f"{options.max_new_tokens}"
        )
    tokenizer = load_tokenizer(checkpoint.tokenizer_source, checkpoint.config.vocab_size)
    most = min(options.max_input_tokens, context - options.max_new_tokens)
    return [prompt_of(article, tokenizer, most) for article in articles]


def summaries_of(
    prompts: Sequence[list[int]], checkpoint: Checkpoint, tokenizer: Tokenizer, options: argparse.Namespace
) -> tuple[list[list[str]], float, int]:
    """Each prompt's summaries, the best first; and how many seconds and tokens they took.

    Raises:
        UsageError: the checkpoint cannot be compiled, or what it computes are no numbers.
    """
    from serving.offline import OfflineEngine
    from serving.opening import open_model

    engines = engine_cache.chosen(options, lambda message: command_line.report(f"summarize.py: {message}"))
    beams: BeamSettings = options.beams
    together = min(options.batch_size, len(prompts)) * beams.beams
    try:
        opened = open_model(
            checkpoint, options.dtype, together, None, engines, lambda message: None, least_sequences=beams.beams
        )
    except EngineError as error:
        raise UsageError(str(error)) from None
    if engines is not None:
        engines.save_pending(wait=False)
    offline = OfflineEngine(opened, tokenizer, checkpoint.config.eos_token_ids, together)
    settings = SamplingSettings(temperature=0.0, max_tokens=options.max_new_tokens, beams=beams)
    requests = (Request("", ids, settings, beams.beams, index) for index, ids in enumerate(prompts))
    started, texts = time.perf_counter(), []
    answers = offline.answers(requests)
    for _ in shown(prompts, "summarize.py"):
        texts.append(["".join(answer.pieces()) for answer in itertools.islice(answers, beams.beams)])
    return texts, time.perf_counter() - started, offline.counters.generated_tokens


def peer_summaries_of(
    prompts: Sequence[list[int]], checkpoint: Checkpoint, tokenizer: Tokenizer, peer: Peer, options: argparse.Namespace
) -> tuple[list[list[str]], float, int]:
    """The same by transformers."""
    endings = checkpoint.config.eos_token_ids
    started, texts, tokens = time.perf_counter(), [], 0
    found = peer.summaries(prompts, options.beams, options.max_new_tokens, endings)
    for _ in shown(prompts, "transformers"):
        beams = next(found)
        tokens += sum(map(len, beams))
        texts.append([tokenizer.decode(ids[:-1] if ids[-1] in endings else ids) for ids in beams])
    return texts, time.perf_counter() - started, tokens


def shown(prompts: Sequence[list[int]], by: str) -> Iterator[list[int]]:
    """The prompts, with a bar that says how far they are."""
    with progress(len(prompts), "article", desc=by) as bar:
        for prompt in prompts:
            yield prompt
            bar.update()


def result_of(
    by: str, articles: Sequence[Article], made: tuple[list[list[str]], float, int], rouge: Rouge
) -> tuple[Result, list[list[dict[str, float]]]]:
    """What a program's summaries are worth: on the whole, and each of them."""
    texts, seconds, tokens = made
    each = [
        [rouge.scores(text, article.highlights) for text in beams]
        for article, beams in zip(articles, texts, strict=True)
    ]
    return Result(by, [mean(scores) for scores in zip(*each, strict=True)], seconds, tokens, len(articles)), each


def write(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """A line of JSON for each article.

    Raises:
        UsageError: the file is there already, or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


def run(options: argparse.Namespace) -> int:
    """Carries out the command; returns its exit code."""
    from tokenizer import load_tokenizer

    rouge = Rouge()
    if options.output is not None:
        check_new(options.output)
        if not options.output.parent.is_dir():
            raise UsageError(f"cannot write {options.output}: {options.output.parent} is no folder")
    articles = read_articles(options.data, options.max_articles)
    source = checkpoint = open_checkpoint(options.model_type, options.revision)
    prompts = prompts_of(articles, source, options)
    peer = Peer(source.path, options.dtype) if options.test_hf else None
    if options.quantization is not None:
        checkpoint = quantized(source, options.quantization)
    if options.threads is not None:
        os.environ["NVTRIPY_PORTABLE_THREADS"] = str(options.threads)  # which the runtime reads when it is first used
    tokenizer = load_tokenizer(source.tokenizer_source, source.config.vocab_size)
    made = summaries_of(prompts, checkpoint, tokenizer, options)
    own, scores = result_of("summarize.py", articles, made, rouge)
    results = [own]
    if peer is not None:
        theirs = peer_summaries_of(prompts, source, tokenizer, peer, options)
        results.append(result_of("transformers", articles, theirs, rouge)[0])
    if options.output is not None:
        write(
            options.output,
            (
                {"index": index, "prompt_tokens": len(prompt), "summaries": texts, "scores": worth}
                for index, (prompt, texts, worth) in enumerate(zip(prompts, made[0], scores, strict=True))
            ),
        )
    print(table(results), flush=True)
    reached, threshold = own.scores[0]["rouge1"], options.rouge1_threshold
    if threshold is not None and reached < threshold:
        command_line.report(f"summarize.py: ROUGE-1 is {reached:.2f}, below the threshold of {threshold:g}")
        return 1
    return 0


def main() -> int:
    """Exit code 0, 1 where ROUGE-1 is below the threshold, or 2 after one line on standard error for input that cannot
    be used."""
    return command_line.main(
        "summarize.py", lambda: run(parse_arguments()), CheckpointError, QuantizationError, LogitsError
    )


if __name__ == "__main__":
    sys.exit(main())

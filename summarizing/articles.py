"""Articles with summaries that people wrote, and what a model that goes on with texts is asked for one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import text_file
from command_line import UsageError
from quantizing.quiet import quiet
from tokenizer import Tokenizer, UnknownCharacterError

HUB_DATASET, HUB_VERSION = "abisee/cnn_dailymail", "3.0.0"
SUFFIX = " TL;DR:"  # after which a summary is what comes (Radford et al. 2019, section 3.6)


@dataclass(frozen=True)
class Article:
    """A text and its summary.

    Attributes:
        where: For messages.
    """

    text: str
    highlights: str
    where: str


def read_articles(data: Path | None, count: int) -> list[Article]:
    """The first articles of a file of JSON lines, with "article" and "highlights" each, or of the data set.

    Args:
        data: The file; None: the test split of CNN/Daily Mail (Hermann et al. 2015; See et al. 2017) from the hub.
        count: At most so many.

    Raises:
        UsageError: they cannot be had, or one has no text.
    """
    rows = _hub_rows(count) if data is None else _file_rows(data)
    articles = [_article(row, where) for row, where in itertools.islice(rows, count)]
    if not articles:
        raise UsageError(f"expected an article on each line of {data} but the file is empty")
    return articles


def _article(row: Any, where: str) -> Article:
    if not isinstance(row, dict):
        raise UsageError(f"expected a JSON object with an article and highlights on {where}")
    for name in ("article", "highlights"):
        if not isinstance(row.get(name), str):
            came = f"got {json.dumps(row[name])[:40]}" if name in row else "it is not there"
            raise UsageError(f"expected {name} to be a text on {where} but {came}")
        if not row[name].strip():
            raise UsageError(f"expected {name} to be a text on {where} but it is empty")
    return Article(row["article"], row["highlights"], where)


def _file_rows(path: Path) -> Iterator[tuple[Any, str]]:
    # Not splitlines, which would also cut at U+2028 within a text.
    lines = text_file.read_text(path).removesuffix("\n").split("\n")
    for number, line in enumerate([] if lines == [""] else lines, 1):
        where = f"line {number} of {path}"
        try:
            yield json.loads(line), where
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise UsageError(f"expected a JSON object on {where} but it is not valid JSON: {reason}") from None


def _hub_rows(count: int) -> Iterator[tuple[Any, str]]:
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"the data set {HUB_DATASET} needs: pip install datasets; or name a file of articles with --data"
        ) from None
    try:
        with quiet():
            split = datasets.load_dataset(HUB_DATASET, HUB_VERSION, split="test", streaming=True)
            rows = list(split.take(count))
    except Exception as error:  # no network, no such data set, or whatever its loader raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"the data set {HUB_DATASET} cannot be loaded from the hub: {reason[:200]}; --data names a file of articles"
        ) from None
    for number, row in enumerate(rows, 1):
        yield row, f"article {number} of {HUB_DATASET}"


def prompt_of(article: Article, tokenizer: Tokenizer, most: int) -> list[int]:
    """The ids of an article with the suffix. Of one that is too long the end is left out, never the suffix.

    Args:
        most: As many tokens, at least as many as the suffix has with a token before it.

    Raises:
        UsageError: the vocabulary lacks a character of it, or the suffix alone is too long.
    """
    text = article.text.strip().replace(" n't", "n't")  # how the data set writes "don't": "do n't"
    try:
        ids = tokenizer.encode(text + SUFFIX)
        kept = tokenizer.encode(text)
        while len(ids) > most:
            # A character may be cut, and what stands before the suffix may be other tokens than within the article.
            kept = kept[: len(kept) - (len(ids) - most)]
            if len(kept) <= len(tokenizer.prefix):
                raise UsageError(f"expected room for more than {most} tokens: they do not hold {SUFFIX!r} and a text")
            text = tokenizer.decode(kept[len(tokenizer.prefix) :], "ignore").rstrip()
            ids = tokenizer.encode(text + SUFFIX)
    except UnknownCharacterError as error:
        raise UsageError(f"{error} on {article.where}") from None
    return ids

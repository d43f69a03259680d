"""Requests, each made when its turn comes: prompts that are all asked the same, or a file that says more of each.

A line of such a file is a JSON object. Lines are read as far as they are needed: they may be any number.

    {"prompt": "To be, or not to be"}
    {"custom_id": "b", "prompt": "Good morrow", "n": 2, "temperature": 0.5, "stop": ["\\n"]}
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Protocol

import text_file
from command_line import UsageError
from response import encode_prompt
from serving.settings import BeamSettings, RequestError, SamplingSettings
from tokenizer import Tokenizer, UnknownCharacterError

NO_ADAPTER = NO_TASK = -1  # as TensorRT-LLM's examples number them
MAX_CHOICES = 1024  # answers to one prompt, which are in memory together

# What a line may have beside its prompt, and of which types. Most are fields of the sampling settings.
_NUMBER, _INTEGER = ((int, float), "a number"), ((int,), "an integer")
_FIELDS: dict[str, tuple[tuple[type, ...], str]] = {
    "prompt": ((str,), "a text"),
    "custom_id": ((str, int), "a text or an integer"),
    "n": _INTEGER,
    "max_tokens": _INTEGER,
    "seed": _INTEGER,
    "temperature": _NUMBER,
    "top_k": _INTEGER,
    "top_p": _NUMBER,
    "min_p": _NUMBER,
    "repetition_penalty": _NUMBER,
    "frequency_penalty": _NUMBER,
    "presence_penalty": _NUMBER,
    "stop": ((str, list), "a text or a list of texts"),
    "lora_task_id": _INTEGER,
    "prompt_task": _INTEGER,
    "num_beams": _INTEGER,
    "length_penalty": _NUMBER,
    "early_stopping": ((bool, str), "true, false or a text"),
}


#: Those of a search for the likeliest answers, and what they set.
_SEARCH = {"num_beams": "beams", "length_penalty": "length_penalty", "early_stopping": "early_stopping"}


@dataclass(frozen=True)
class Request:
    """A prompt, and what is asked of its answers.

    Attributes:
        ids: The prompt's.
        choices: How many answers.
        index: Which of all requests it is, from 0.
        custom_id: What its author calls it.
        adapter: The number of the one that its answers have; ``NO_ADAPTER``: none.
        virtual: Ids of virtual tokens before the prompt's.
    """

    prompt: str
    ids: list[int]
    settings: SamplingSettings
    choices: int = 1
    index: int = 0
    custom_id: str | int | None = None
    adapter: int = NO_ADAPTER
    virtual: Sequence[int] = ()

    @property
    def width(self) -> int:
        """How many sequences it takes at most, at the same time."""
        beams = self.settings.beams
        return self.choices if beams is None else beams.beams


class Jobs(Protocol):
    """Where requests come from.

    Attributes:
        count, answers: How many requests and answers there are; of a file, once :meth:`check` has counted them.
        sequences: How many sequences they take, ``beams`` of them at once for the widest search, or one.
        tasks: The virtual tokens of each task, for whoever has read them before :meth:`check`.
    """

    count: int
    answers: int
    sequences: int
    beams: int
    tasks: Sequence[Sequence[int]]

    def check(self, tokenizer: Tokenizer, context: int, vocabulary: int) -> None:
        """Looks at all of them, so that what is wrong with any is known before anything is computed.

        Args:
            context, vocabulary: Of the model, in tokens.

        Raises:
            UsageError: one cannot be carried out; it says on which line of which file.
        """

    def requests(self, tokenizer: Tokenizer, context: int, vocabulary: int, start: int = 0) -> Iterator[Request]:
        """The requests from number ``start`` on."""


class Prompts:
    """Prompts that are asked the same.

    Args:
        choices: Answers to each.
        path: The file that they are the lines of, if they are.
        adapters: The number of each prompt's adapter.
        chosen: The number of each prompt's task; None: the only one, where there is one.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        settings: SamplingSettings,
        choices: int,
        path: Path | None,
        adapters: Sequence[int] = (),
        chosen: Sequence[int] | None = None,
    ) -> None:
        self._prompts, self._settings, self._choices, self._path = prompts, settings, choices, path
        self._adapters = adapters or [NO_ADAPTER] * len(prompts)
        self._chosen = chosen
        self.tasks: Sequence[Sequence[int]] = ()
        self.count, self.answers = len(prompts), len(prompts) * choices
        self.beams = 1 if settings.beams is None else settings.beams.beams
        self.sequences = len(prompts) * max(choices, self.beams)

    def check(self, tokenizer: Tokenizer, context: int, vocabulary: int) -> None:
        """As of :class:`Jobs`."""
        for index in range(self.count):
            self._request(index, tokenizer, context)

    def requests(self, tokenizer: Tokenizer, context: int, vocabulary: int, start: int = 0) -> Iterator[Request]:
        """As of :class:`Jobs`."""
        for index in range(start, self.count):
            yield self._request(index, tokenizer, context)

    def _request(self, index: int, tokenizer: Tokenizer, context: int) -> Request:
        prompt = self._prompts[index]
        try:
            virtual = self._virtual(index)
            ids = encode_prompt(prompt, tokenizer, context - len(virtual))
        except (UsageError, UnknownCharacterError) as error:
            where = "" if self._path is None else f" on line {index + 1} of {self._path}"
            raise UsageError(f"{error}{where}") from None
        settings = _fitted(self._settings, len(ids), context - len(virtual))
        return Request(prompt, ids, settings, self._choices, index, adapter=self._adapters[index], virtual=virtual)

    def _virtual(self, index: int) -> Sequence[int]:
        if self._chosen is None and len(self.tasks) > 1:
            raise UsageError(
                f"expected --prompt-tasks with {len(self.tasks)} tasks: the number of each prompt's, or -1"
            )
        return _virtual(None if self._chosen is None else self._chosen[index], self.tasks, "--prompt-tasks")


def _virtual(task: int | None, tasks: Sequence[Sequence[int]], name: str) -> Sequence[int]:
    """The virtual tokens of a task; of None those of the only one, where there is one.

    Raises:
        UsageError: there is no such task.
    """
    task = task if task is not None else 0 if len(tasks) == 1 else NO_TASK
    if not NO_TASK <= task < len(tasks):
        there = f" to {len(tasks) - 1}" if tasks else ", as there is no --prompt-table,"
        raise UsageError(f"expected {name} to be {NO_TASK} (none){there} but got {task}")
    return () if task == NO_TASK else tasks[task]


def _fitted(settings: SamplingSettings, prompt_tokens: int, context: int) -> SamplingSettings:
    """The settings, for as many tokens as the context has room for behind the prompt: the last one needs no place."""
    return replace(settings, max_tokens=min(settings.max_tokens, context - prompt_tokens + 1))


class JobFile:
    """The requests of a file of JSON lines.

    Args:
        path: It may be a pipe, whose content is then put into a temporary file.
        usual: What a line does not say.
        choices: Answers to a prompt whose line does not say how many.
        adapters: How many adapters there are, of which a line may name one by its number; where there is one, it is
            that of a line that says nothing.

    Attributes:
        size: Of the file, in bytes.
        digest: Of its content and the prompts' ids, once :meth:`check` has read it.

    Raises:
        UsageError: it cannot be read.
    """

    def __init__(self, path: Path, usual: SamplingSettings, choices: int, adapters: int = 0) -> None:
        self.path, self.usual, self.choices = path, usual, choices
        self._adapters = adapters
        self.count = self.answers = self.sequences = 0
        self.beams = 1
        self.digest = ""
        self.tasks: Sequence[Sequence[int]] = ()
        try:
            self._file: BinaryIO = path.open("rb")
            if not self._file.seekable():
                pipe, self._file = self._file, tempfile.TemporaryFile()  # noqa: SIM115 (as long as this object lives)
                with pipe:
                    shutil.copyfileobj(pipe, self._file)
            self.size = self._file.seek(0, os.SEEK_END)
        except (OSError, ValueError) as error:  # ValueError: a name with a NUL in it
            raise UsageError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None

    def check(
        self,
        tokenizer: Tokenizer,
        context: int,
        vocabulary: int,
        told: Callable[[int], object] = lambda count: None,
    ) -> None:
        """As of :class:`Jobs`; ``told`` is told of each line's bytes."""
        digest = hashlib.sha256()
        for index, line in enumerate(self._lines()):
            request = self._request(index, line, tokenizer, context, vocabulary)
            digest.update(line)
            digest.update(repr([*request.virtual, *request.ids]).encode())
            self.count, self.answers = index + 1, self.answers + request.choices
            self.sequences += request.width
            if request.settings.beams is not None:
                self.beams = max(self.beams, request.width)
            told(len(line))
        if self.count == 0:
            raise UsageError(f"expected a JSON object on each line of {self.path} but the file is empty")
        self.digest = digest.hexdigest()

    def requests(self, tokenizer: Tokenizer, context: int, vocabulary: int, start: int = 0) -> Iterator[Request]:
        """As of :class:`Jobs`.

        Raises:
            UsageError: as of :meth:`check`, if the file has changed since.
        """
        for index, line in enumerate(self._lines()):
            if index >= start:
                yield self._request(index, line, tokenizer, context, vocabulary)

    def _lines(self) -> Iterator[bytes]:
        try:
            self._file.seek(0)
            yield from self._file
        except OSError as error:
            raise UsageError(f"cannot read {self.path}: {error.strerror}") from None

    def _request(self, index: int, line: bytes, tokenizer: Tokenizer, context: int, vocabulary: int) -> Request:
        where = f"line {index + 1} of {self.path}"
        found = _parsed(text_file.decode_text(line, where), where)
        fields = {name: value for name, value in found.items() if value is not None}
        if "prompt" not in fields:
            raise UsageError(f"expected a prompt on {where} but it has none")
        choices = fields.get("n", self.choices)
        if not 1 <= choices <= MAX_CHOICES:
            raise UsageError(f"expected n to be 1 to {MAX_CHOICES} on {where} but got {choices}")
        adapter = fields.get("lora_task_id", 0 if self._adapters == 1 else NO_ADAPTER)
        if not NO_ADAPTER <= adapter < self._adapters:
            raise UsageError(
                f"expected lora_task_id to be {described_adapters(self._adapters)} on {where} but got {adapter}"
            )
        own = {name: value for name, value in fields.items() if name in SamplingSettings.__dataclass_fields__}
        if "stop" in own:
            own["stop"] = (own["stop"],) if isinstance(own["stop"], str) else tuple(own["stop"])
        if own.get("top_k") == 0:  # as of --top-k
            own["top_k"] = None
        searched = {_SEARCH[name]: value for name, value in fields.items() if name in _SEARCH}
        try:
            settings = replace(_searching(self.usual, searched), **own)
            settings.check(vocabulary)
            if settings.beams is not None and choices > settings.beams.beams:
                raise RequestError(f"expected n to be at most num_beams ({settings.beams.beams}) but got {choices}")
            virtual = _virtual(fields.get("prompt_task"), self.tasks, "prompt_task")
            ids = encode_prompt(fields["prompt"], tokenizer, context - len(virtual))
        except (RequestError, UsageError, UnknownCharacterError) as error:
            raise UsageError(f"{error} on {where}") from None
        settings = _fitted(settings, len(ids), context - len(virtual))
        return Request(fields["prompt"], ids, settings, choices, index, fields.get("custom_id"), adapter, virtual)


def described_adapters(count: int) -> str:
    """The numbers that adapters can have, in words."""
    return f"{NO_ADAPTER} (none)" + (f" to {count - 1}" if count else ", as there is no --lora,")


def _searching(usual: SamplingSettings, searched: dict[str, Any]) -> SamplingSettings:
    """What a line does not say, where it says so of a search. Where there is one, what it cannot heed is not usual.

    Raises:
        RequestError: there is no search that it could speak of.
    """
    if usual.beams is None and "beams" not in searched:
        if searched:
            raise RequestError(f"expected num_beams with {next(iter(searched))}")
        return usual
    neutral: dict[str, Any] = {"temperature": 0.0, "top_k": None, "top_p": None, "stop": ()}
    beams = BeamSettings(**searched) if usual.beams is None else replace(usual.beams, **searched)
    return replace(usual, **neutral, beams=beams)


def _parsed(text: str, where: str) -> dict[str, Any]:
    """The fields of a line, each of its type, or None.

    Raises:
        UsageError: it is no object of such fields.
    """
    try:
        found = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise UsageError(f"expected a JSON object on {where} but it is not valid JSON: {reason}") from None
    if not isinstance(found, dict):
        raise UsageError(f"expected a JSON object on {where} but got {_shown(found)}")
    for name, value in found.items():
        if name not in _FIELDS:
            raise UsageError(f"unknown field {_shown(name)} on {where}: expected {', '.join(_FIELDS)}")
        types, described = _FIELDS[name]
        is_right = isinstance(value, types) and (bool in types or not isinstance(value, bool))
        if isinstance(value, list):
            is_right = is_right and all(isinstance(each, str) for each in value)
        if value is not None and not is_right:
            raise UsageError(f"expected {name} to be {described} on {where} but got {_shown(value)}")
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str) and not _is_text(each):
                raise UsageError(f"expected {name} to be Unicode text on {where} but it has half of a surrogate pair")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}…"

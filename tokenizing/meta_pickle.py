"""nanoGPT's meta.pkl: the alphabet of a text that its prepare.py took apart into characters.

    {"vocab_size": 65, "stoi": {"\\n": 0, " ": 1, ...}, "itos": {0: "\\n", 1: " ", ...}}

A pickle is a program. This one is not run: the operations that make dictionaries, lists, texts and numbers are read off
one after the other (by `pickletools`, which only takes a pickle apart), and any other operation refuses the file.
"""

from __future__ import annotations

import io
import pickletools
import reprlib
from pathlib import Path
from typing import Any

from tokenizing.characters import CharacterTokenizer
from tokenizing.description import shown
from tokenizing.sources import MetaPickle
from weight_loader import CheckpointError

_VALUES: tuple[str, ...] = (
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "UNICODE",
    "BININT",
    "BININT1",
    "BININT2",
    "INT",
    "LONG",
)
_VALUES += ("LONG1", "LONG4", "BINFLOAT", "FLOAT", "SHORT_BINSTRING", "BINSTRING", "STRING")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
# One list can be in another a million times, which a plain repr would write a million times.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlong = 2, 40
_LARGEST = 64 << 20  # bytes: Unicode has a million characters, and each is named twice


def load_meta(source: MetaPickle, vocab_size: int) -> CharacterTokenizer:
    """The tokenizer of a meta.pkl, for a model of `vocab_size` embeddings.

    Raises:
        CheckpointError: it cannot be read, holds something else, or more characters than there are embeddings.
    """
    letters = read_meta(source)
    letter = max(letters, key=letters.__getitem__)
    if letters[letter] >= vocab_size:
        raise CheckpointError(
            f"{source.path} numbers {letter!r} {shown(letters[letter])}, but the model's vocabulary has {vocab_size}"
        )
    return CharacterTokenizer(source.path, letters)


def read_meta(source: MetaPickle) -> dict[str, int]:
    """The alphabet of a meta.pkl: the number of each character.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    path = source.path
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if len(content) > _LARGEST:
        raise CheckpointError(f"{path}: expected an alphabet, got more than {_LARGEST} bytes")
    meta = _value_of(path, content)
    letters = meta.get("stoi") if isinstance(meta, dict) else None
    if not isinstance(letters, dict) or not letters:
        raise CheckpointError(f"{path}: expected a dictionary with stoi, the numbers of characters, got {_shown(meta)}")
    for letter, number in letters.items():
        if not isinstance(letter, str) or len(letter) != 1 or type(number) is not int:
            raise CheckpointError(f"{path}: expected stoi to number characters, got {_shown((letter, number))}")
        if number < 0:
            raise CheckpointError(f"{path}: expected stoi to number characters from 0, got {_shown((letter, number))}")
    if len(set(letters.values())) < len(letters):
        raise CheckpointError(f"{path}: expected each character to have a number of its own")
    back = meta.get("itos")
    if back != {number: letter for letter, number in letters.items()}:
        raise CheckpointError(f"{path}: expected itos to be the inverse of stoi")
    return letters


def _shown(value: object) -> str:
    try:
        return _SHORT.repr(value)
    except ValueError:  # an integer beyond Python's limit for printing
        return f"a {type(value).__name__}"


def _value_of(path: Path, content: bytes) -> Any:
    """What a pickle of plain values makes, each value a dictionary, list, text or number."""
    try:
        return _read(path, content)
    except CheckpointError:
        raise
    except Exception as error:  # pickletools and damaged files: almost anything
        raise CheckpointError(f"{path} is not a sound pickle: {type(error).__name__}: {error}") from error


def _read(path: Path, content: bytes) -> Any:
    stack: list[Any] = []
    marks: list[int] = []  # where on the stack the items of a collection begin
    memo: dict[Any, Any] = {}

    def since_mark() -> list[Any]:
        place = marks.pop()
        items = stack[place:]
        del stack[place:]
        return items

    for operation, argument, _ in pickletools.genops(io.BytesIO(content)):
        match operation.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack[-1]
            case "MARK":
                marks.append(len(stack))
            case name if name in _VALUES:
                stack.append(argument)
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "DICT":
                items = since_mark()
                stack.append(dict(zip(items[::2], items[1::2], strict=True)))
            case "LIST":
                stack.append(since_mark())
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1][key] = value
            case "SETITEMS":
                items = since_mark()
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "APPEND":
                value = stack.pop()
                stack[-1].append(value)
            case "APPENDS":
                items = since_mark()
                stack[-1].extend(items)
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case name:
                raise CheckpointError(
                    f"{path}: expected a pickle of texts and numbers alone, got the operation {name}, which may "
                    "execute something"
                )
    raise CheckpointError(f"{path} is not a sound pickle: it has no end")

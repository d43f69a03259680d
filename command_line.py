"""What the programs' command lines have in common: options that several take, one line for bad input, exit codes.

It imports nothing that takes time.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import interrupt

EMBEDDED_CHECKPOINT = Path(__file__).resolve().parent / "checkpoints" / "shakespeare"
MAX_THREADS = 1024  # of the portable runtime, which refuses more


class UsageError(Exception):
    """The command cannot be carried out as given; one line says what was expected and what came."""


class Parser(argparse.ArgumentParser):
    """Options as they are spelled, no abbreviations; what is wrong with them is a :class:`UsageError`."""

    def __init__(self, program: str, description: str) -> None:
        super().__init__(prog=program, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """One line, without the usage that argparse would print before it."""
        raise UsageError(message)


def path(text: str) -> Path:
    """An option's path. Shells put a home folder in the place of ``~`` at a word's start only, not in --engine-dir=~/x.

    >>> path("~nobody-there/x")  # as it is
    PosixPath('~nobody-there/x')
    """
    return Path(os.path.expanduser(text))


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that name a checkpoint."""
    parser.add_argument(
        "--model-type",
        metavar="NAME",
        default=EMBEDDED_CHECKPOINT,
        help="a folder in HuggingFace's format or of ranks' files, a .gguf or .nemo file, nanoGPT's ckpt.pt, or a hub "
        "name such as gpt2 (default: the embedded checkpoint)",
    )
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit at the hub")


def add_engine_arguments(parser: argparse._ActionsContainer) -> None:
    """The options that say where compiled engines are kept: engine_cache.py reads them."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--engine-dir",
        metavar="DIR",
        type=path,
        help="save the compiled engine here and reopen it next time (default: ~/.cache/nanogpt-tripy/engines)",
    )
    group.add_argument("--no-engine-cache", action="store_true", help="compile anew, and keep no engine")


def check_range(options: argparse.Namespace, **ranges: tuple[int, int | None]) -> None:
    """Refuses numbers that are too small or too large; an option that is not given (None) is neither.

    Args:
        ranges: For each option the least and the largest; None: there is no largest.

    Raises:
        UsageError: one of them is.

    >>> check_range(argparse.Namespace(max_tokens=0), max_tokens=(1, None))
    Traceback (most recent call last):
    ...
    command_line.UsageError: expected --max-tokens to be at least 1 but got 0
    """
    for name, (least, most) in ranges.items():
        value, option = getattr(options, name), f"--{name.replace('_', '-')}"
        if value is not None and value < least:
            raise UsageError(f"expected {option} to be at least {least} but got {value}")
        if value is not None and most is not None and value > most:
            raise UsageError(f"expected {option} to be at most {most} but got {value}")


def report(message: str) -> None:
    """A line on standard error."""
    print(message, file=sys.stderr)


def main(program: str, command: Callable[[], int | None], *expected: type[Exception], prints: bool = True) -> int:
    """Carries out a program's command.

    Args:
        program: Its name, for messages.
        command: What it does; returns its exit code, None for 0.
        expected: Exceptions that are, like :class:`UsageError`, about input that cannot be used.
        prints: Whether the result goes to standard output, without which the command would be in vain.

    Returns:
        The exit code: ``command``'s own; 2 after one line on standard error for input that cannot be used, or a file
        that cannot be read or written, or too little memory; 1 where the reader of standard output has gone; 130 after
        Ctrl-C.
    """
    unusable: tuple[type[Exception], ...] = (UsageError, *expected)
    if sys.stdout is not None:
        sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    elif prints:
        return fail(program, "standard output is closed")
    try:
        try:
            with interrupt.raised():
                return command() or 0
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # --help, which leaves by SystemExit, has not done so
    except unusable as error:
        return fail(program, str(error))
    except OSError as error:
        # What could not be written is still in the buffer, and the interpreter would try again at exit, and complain.
        with contextlib.suppress(AttributeError, OSError):  # there is no standard output, or it is not a file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 1  # the reader has gone: nothing more to say
        where = error.filename or ("standard output" if prints else None)
        return fail(program, f"{where}: {error.strerror}" if where else str(error))
    except MemoryError as error:
        return fail(program, f"there is not enough memory{f': {error}' if str(error) else ''}")
    except KeyboardInterrupt:
        return interrupt.EXIT_CODE


def fail(program: str, message: str) -> int:
    """The one line of an error; returns the exit code that goes with it."""
    report(f"{program}: error: {' '.join(message.split())}")
    return 2

"""example.py as its user meets it: every option, what goes to stdout and what to stderr, and all kinds of bad input."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import io
import itertools
import json
import os
import pty
import re
import resource
import select
import shutil
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupting import interrupt
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import (
    CONTEXT,
    EOS,
    edit_config,
    overflowing_checkpoint,
    random_checkpoint,
    reciting_checkpoint,
    script_of,
)

import example
import generation
import generation_options
import tokenizer
from command_line import EMBEDDED_CHECKPOINT
from response import Response
from serving.offline import Answer

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "example.py"

#: As at a user's shell: an unbuffered stdout would hide what is never flushed.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}

needs_embedded = pytest.mark.skipif(
    not (EMBEDDED_CHECKPOINT / "model.safetensors").is_file(),
    reason=f"{EMBEDDED_CHECKPOINT} is not there",
)

VERSE = "The cat sat on the mat."
FOREIGN = "né €5 😀 ∀x∃y. ÄÖ 日本語 😀."
#: Prompts of different lengths, and one of characters that take several bytes.
PROMPTS = ["Once upon a time", "é", "The", "日本"]


# --- the checkpoints -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine folder for all tests together, so that each model is compiled once."""
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="session")
def arbitrary(checkpoints: Path) -> Path:
    """Says arbitrary bytes, which depend on all of the prompt."""
    return random_checkpoint(checkpoints / "arbitrary")


@pytest.fixture(scope="session")
def verse(checkpoints: Path) -> Path:
    """Says VERSE, then ends."""
    return reciting_checkpoint(checkpoints / "verse", script_of(VERSE))


@pytest.fixture(scope="session")
def foreign(checkpoints: Path) -> Path:
    """Says FOREIGN, then ends."""
    return reciting_checkpoint(checkpoints / "foreign", script_of(FOREIGN))


@pytest.fixture(scope="session")
def choice(checkpoints: Path) -> Path:
    """Says "a", "b" or "c", the likelier the earlier, until its context is full."""
    return reciting_checkpoint(checkpoints / "choice", [b"abc"] * (CONTEXT + 1))


# --- ways to run it --------------------------------------------------------------------------------------------------


@dataclass
class Result:
    code: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        """What was printed, without the line's end."""
        assert self.out.endswith(b"\n")
        return self.out[:-1].decode()

    @property
    def texts(self) -> list[str]:
        return self.text.split(f"\n{'-' * 16}\n")


def as_arguments(options: dict[str, Any]) -> list[str]:
    """``top_k=3`` → ``--top-k=3``, ``stream=True`` → ``--stream``, a list → the option repeated."""
    arguments = []
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        for each in value if isinstance(value, list) else [value]:
            if each is True:
                arguments.append(option)
            elif each is not None and each is not False:
                arguments.append(f"{option}={each}")
    return arguments


Ask = Callable[..., Result]


@pytest.fixture
def ask(
    monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes], engines: Path, arbitrary: Path
) -> Ask:
    """Runs main() in this process. Up to 30 arbitrary bytes, computed in float32, unless an option says otherwise."""

    def run(stdin: bytes = b"", **options: Any) -> Result:
        usual = {"model_type": arbitrary, "engine_dir": engines, "dtype": "float32", "max_new_tokens": 30}
        options = {**usual, **options}
        monkeypatch.setattr(sys, "argv", ["example.py", *as_arguments(options)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = example.main()
        captured = capsysbinary.readouterr()
        return Result(code, captured.out, captured.err.decode())

    return run


def start(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    """example.py in a process of its own, which shares nothing with this one but the machine."""
    command = [sys.executable, str(EXAMPLE), *map(str, arguments)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **{"env": ENVIRONMENT, **pipes, **options})


def execute(*arguments: object, **options: Any) -> Result:
    with start(*arguments, **options) as process:
        out, err = process.communicate()
    return Result(process.returncode, out or b"", (err or b"").decode())


# --- options ---------------------------------------------------------------------------------------------------------


def test_help_and_docs_name_the_same_options() -> None:
    """With the same defaults, as far as they are numbers or names."""
    pages = "".join((ROOT / "docs" / name).read_text() for name in ("generation.md", "quantization.md"))
    table = re.findall(r"^\| `(--[a-z-]+)[^`]*` \|.*\| (.*) \|$", pages, re.MULTILINE)
    done = execute("--help")
    assert (done.code, done.err) == (0, "")
    shown = done.out.decode()
    assert {option for option, _ in table} == set(re.findall(r"^  (--[a-z-]+)", shown, re.MULTILINE))
    defaults = vars(example.parse_arguments([]))
    for option, default in table:
        name = option[2:].replace("-", "_")
        found = defaults[name] if name in defaults else not defaults[name.removeprefix("no_")]
        if found in (None, False, []) or option in ("--seed", "--model-type"):
            assert re.fullmatch("[\\w ',;]+", default), f"docs/ gives {option} the default {default!r}"
        else:
            assert str(found) == default.strip("`")


def test_the_text_does_not_depend_on_threads(answer: list[object]) -> None:
    one, two = (execute(*answer, f"--threads={count}") for count in (1, 2))
    assert one == two and one.code == 0


def test_same_seed_same_text(ask: Ask) -> None:
    first, again, other = (ask(input_text="The", seed=seed).out for seed in (1, 1, 2))
    assert first == again != other


def test_without_a_seed_each_run_is_new(ask: Ask) -> None:
    assert ask(input_text="The").out != ask(input_text="The").out


def test_every_seed_of_its_range(ask: Ask) -> None:
    assert ask(input_text="The", seed=0).code == ask(input_text="The", seed=generation.MAX_SEED).code == 0


def test_the_prompt_comes_first(ask: Ask) -> None:
    assert ask(input_text="Once upon", seed=1).text.startswith("Once upon")


def test_prompt_from_standard_input(ask: Ask) -> None:
    """Without the line's end that `echo` adds, but with those within it."""
    expected = ask(input_text=" né\nThe ", seed=1)
    assert ask(stdin=" né\nThe \n".encode(), seed=1) == ask(stdin=" né\nThe ".encode(), seed=1) == expected


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_each_line_of_a_batch_is_answered_as_alone(ask: Ask, tmp_path: Path, temperature: float) -> None:
    (tmp_path / "prompts").write_text("\n".join(PROMPTS) + "\n")
    together = ask(batch=tmp_path / "prompts", seed=3, temperature=temperature)
    assert together.texts == [ask(input_text=prompt, seed=3, temperature=temperature).text for prompt in PROMPTS]


def test_more_prompts_than_are_computed_together(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("\n".join(PROMPTS[:3]))
    together = ask(batch=tmp_path / "prompts", seed=3, num_samples=2)  # two prompts' answers, then one's and padding
    assert together == ask(batch=tmp_path / "prompts", seed=3, num_samples=2, stream=True)
    assert len(together.texts) == 6


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_guesses_change_no_text(ask: Ask, tmp_path: Path, arbitrary: Path, temperature: float, stream: bool) -> None:
    """By lookup, by the model itself, by another one; of one prompt and of many."""
    (tmp_path / "prompts").write_text("\n".join(PROMPTS * 3))
    other = random_checkpoint(tmp_path / "other", 1)
    for source in ({"input_text": "The"}, {"batch": tmp_path / "prompts", "num_samples": 2}):
        expected = ask(**source, seed=3, temperature=temperature)
        for guesser in ("prompt-lookup", arbitrary, other):
            assert ask(**source, seed=3, temperature=temperature, speculate=guesser, stream=stream) == expected


def test_verbose_tells_of_guesses(ask: Ask, arbitrary: Path) -> None:
    found = ask(input_text="The", seed=3, speculate=arbitrary, verbose=True)
    counts = re.search(r"^(\d+) of (\d+) guesses were right$", found.err, re.MULTILINE)
    assert counts is not None and counts[1] == counts[2] != "0"
    assert ", 30 tokens, " in found.err


def test_a_bar_for_many_answers_at_a_terminal(answer: list[object], tmp_path: Path) -> None:
    """On standard error, which is clean in the end; the text is what it is without."""
    (tmp_path / "prompts").write_text("The\n" * 20)
    given = [*answer[:5], f"--batch={tmp_path / 'prompts'}"]
    expected = execute(*given)
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))  # a new one has no columns
    with start(*given, stderr=terminal) as process:
        out, _ = process.communicate()
    os.close(terminal)
    seen = b""
    with contextlib.suppress(OSError):  # which is how a terminal ends that nobody has open any more
        while piece := os.read(controller, 1 << 16):
            seen += piece
    os.close(controller)
    assert (process.returncode, out) == (0, expected.out) and expected.err == ""
    assert b"/20" in seen and seen.endswith(b" \r")


def test_only_line_ends_separate_prompts(ask: Ask, tmp_path: Path) -> None:
    """Windows's too; but a form feed or Unicode's line separator is part of a prompt."""
    (tmp_path / "prompts").write_bytes("a\fb\u2028c\r\nd\n".encode())
    first, second = ask(batch=tmp_path / "prompts", seed=1, stream=True).texts
    assert first.startswith("a\fb\u2028c") and second.startswith("d")


@pytest.mark.parametrize("top_k", [256 + 1, 1 << 31, 1 << 63, 1 << 64, 10**30])
def test_a_top_k_beyond_the_vocabulary_keeps_all(ask: Ask, top_k: int) -> None:
    assert ask(input_text="The", seed=1, top_k=top_k) == ask(input_text="The", seed=1, top_k=0)


def test_any_number_of_new_tokens_ends_with_the_context(ask: Ask) -> None:
    assert ask(input_text="The", seed=1, max_new_tokens=10**30) == ask(input_text="The", seed=1, max_new_tokens=64)


@pytest.mark.parametrize("stream", [False, True])
def test_samples_without_end_come_one_after_another(ask: Ask, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    """They are not all planned first: a billion would fill the memory."""
    pieces, asked = Answer.pieces, []

    def interrupted(self: Answer) -> Iterator[str]:
        if len(asked) == 70:
            raise KeyboardInterrupt
        asked.append(self.sample)
        return pieces(self)

    monkeypatch.setattr(Answer, "pieces", interrupted)
    found = ask(input_text="The", seed=1, num_samples=10**30, stream=stream, max_new_tokens=2)
    assert found.code == 130
    assert asked == list(range(70))
    assert found.out


def test_num_samples(ask: Ask) -> None:
    one, four = ask(input_text="The", seed=1), ask(input_text="The", seed=1, num_samples=4)
    assert four.texts[0] == one.text, "the first sample does not depend on how many there are"
    assert len(set(four.texts)) == 4
    assert four == ask(input_text="The", seed=1, num_samples=4)


def test_temperature_zero_is_greedy_whatever_the_seed(ask: Ask, choice: Path) -> None:
    greedy = {ask(input_text="The", temperature=0, seed=seed).out for seed in (1, 2, None)}
    assert len(greedy) == 1
    assert ask(model_type=choice, input_text="x", temperature=0).text == "x" + "a" * 30


def test_a_higher_temperature_takes_less_likely_tokens_more_often(ask: Ask, choice: Path) -> None:
    counts = [ask(model_type=choice, input_text="x", temperature=t, seed=1).text.count("a") for t in (0.1, 0.8, 1e6)]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[2] > 0


@pytest.mark.parametrize(("top_k", "letters"), [(1, "a"), (2, "ab"), (3, "abc")])
def test_top_k(ask: Ask, choice: Path, top_k: int, letters: str) -> None:
    found = ask(model_type=choice, input_text="x", top_k=top_k, temperature=1e6, seed=1)
    assert set(found.text[1:]) == set(letters)


def test_top_k_zero_keeps_all(ask: Ask) -> None:
    """At a temperature so high that all tokens are equally likely, hardly any two samples begin with the same one."""
    found = ask(input_text="x", top_k=0, temperature=1e9, seed=1, max_new_tokens=1, num_samples=40)
    assert len(set(found.texts) - {"x\ufffd"}) > 10  # bytes that are no character all look the same


@pytest.mark.parametrize(("top_p", "letters"), [(0.3, "a"), (0.5, "ab"), (1, "abc")])
def test_top_p(ask: Ask, choice: Path, top_p: float, letters: str) -> None:
    """With top-k's help, which leaves three letters of nearly the same probability."""
    found = ask(model_type=choice, input_text="x", top_k=3, top_p=top_p, temperature=100, seed=1)
    assert set(found.text[1:]) == set(letters)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("t", "The ca"),
        ("sat", "The cat "),
        (" sat on the ", "The cat"),
        (["mat", "on", "sit"], "The cat sat "),
        (["sat on", "at on"], "The cat "),
        ("sat in", VERSE),
        ("mat..", VERSE),
        ("The", VERSE),
        ("x", VERSE),
    ],
)
def test_stop(ask: Ask, verse: Path, stop: str | list[str], expected: str, stream: bool) -> None:
    """A token is one byte here, so that every stop text spans several. The prompt is not searched."""
    found = ask(model_type=verse, input_text="The", stop=stop, stream=stream)
    assert found.text == expected


def test_stop_in_some_rows_only(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("\n".join(PROMPTS))
    free = ask(batch=tmp_path / "prompts", seed=3)
    letter = min(set(free.texts[0][len(PROMPTS[0]) :]) - {"\ufffd"}, key=free.text.count)
    stopped = ask(batch=tmp_path / "prompts", seed=3, stop=letter)
    cut = [prompt + text[len(prompt) :].split(letter)[0] for prompt, text in zip(PROMPTS, free.texts, strict=True)]
    assert stopped.texts == cut != free.texts


def test_end_of_text_ends_a_response(ask: Ask, verse: Path) -> None:
    assert ask(model_type=verse, input_text="T").text == VERSE
    assert ask(model_type=verse, input_text="T", stream=True).text == VERSE


@pytest.mark.parametrize(
    ("endings", "expected"),
    [
        ({"eos_token_id": ord("o")}, "The cat sat "),  # of generation_config.json, where config.json has another
        ({"eos_token_id": [ord("."), ord("o"), EOS]}, "The cat sat "),
        ({"eos_token_id": []}, None),
        ({}, None),
    ],
)
def test_endings_of_generation_config(
    ask: Ask, verse: Path, tmp_path: Path, endings: dict[str, Any], expected: str | None
) -> None:
    copy = tmp_path / "verse"
    shutil.copytree(verse, copy)
    (copy / "generation_config.json").write_text(json.dumps(endings))
    found = ask(model_type=copy, input_text="T", max_new_tokens=len(VERSE)).text
    assert found == (VERSE + "<|endoftext|>" if expected is None else expected)


def test_an_engine_is_the_same_whatever_ends_a_text(ask: Ask, verse: Path, tmp_path: Path) -> None:
    copy = tmp_path / "verse"
    shutil.copytree(verse, copy)
    for ending in ([], [ord("o")]):
        (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": ending}))
        assert ask(model_type=copy, input_text="T", max_new_tokens=2, engine_dir=tmp_path / "engines").code == 0
    assert len(list((tmp_path / "engines").glob("*.engine"))) == 1


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.8}, {"top_k": 0}, {"stream": True}])
def test_what_overflows_on_the_way_gives_no_token(ask: Ask, tmp_path: Path, options: dict[str, Any]) -> None:
    folder = overflowing_checkpoint(tmp_path / "overflowing")
    done = ask(model_type=folder, input_text="To be", dtype="float16", **options)
    assert done.code == 2 and done.err.count("\n") == 1 and done.out in (b"", b"To be")
    assert re.match(
        r"example.py: error: the model's numbers are not finite .* bfloat16 or float32, may hold it", done.err
    )
    assert ask(model_type=folder, input_text="To be", dtype="bfloat16", **options).code == 0


def test_max_new_tokens(ask: Ask, verse: Path) -> None:
    assert ask(model_type=verse, input_text="The", max_new_tokens=4).text == "The cat"
    assert ask(model_type=verse, input_text="The", max_new_tokens=1).text == "The "


def test_max_new_tokens_beyond_the_context(ask: Ask, choice: Path) -> None:
    """The last token comes from a full context, and is not in it itself."""
    for prompt in ("x", "x" * 40, "x" * (CONTEXT - 1), "x" * CONTEXT):
        found = ask(model_type=choice, input_text=prompt, max_new_tokens=10**9, seed=1)
        assert len(found.text) == CONTEXT + 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype(ask: Ask, dtype: str) -> None:
    found = ask(input_text="The", dtype=dtype, seed=1)
    assert found.text.startswith("The") and found == ask(input_text="The", dtype=dtype, seed=1)


def test_dtypes_are_different_computations(monkeypatch: pytest.MonkeyPatch, ask: Ask) -> None:
    logits: dict[str, np.ndarray] = {}

    def keep(self: generation.Sampler, row: np.ndarray) -> int:
        logits[dtype] = row.copy()
        return 0

    monkeypatch.setattr(generation.Sampler, "__call__", keep)
    for dtype in ("float32", "float16", "bfloat16"):
        ask(input_text="The", dtype=dtype, max_new_tokens=1)
    errors = [np.abs(logits[dtype] - logits["float32"]).max() for dtype in ("float16", "bfloat16")]
    scale = np.abs(logits["float32"]).max()
    assert 0 < errors[0] < 0.01 * scale and errors[0] < errors[1] < 0.1 * scale


def test_model_type_and_revision_reach_the_loader(ask: Ask, arbitrary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the loader makes of them is tests/test_hub.py's business."""
    asked = []
    real = example.open_checkpoint

    def open_checkpoint(*arguments: object) -> object:
        asked.append(arguments)
        return real(arbitrary)

    monkeypatch.setattr(example, "open_checkpoint", open_checkpoint)
    expected = ask(input_text="The", seed=1)
    assert ask(input_text="The", seed=1, model_type="gpt2", revision="v1") == expected
    assert asked == [(str(arbitrary), None), ("gpt2", "v1")]


@needs_embedded
def test_the_embedded_checkpoint_is_the_default(ask: Ask) -> None:
    given = {"model_type": None, "dtype": None, "input_text": "To be", "max_new_tokens": 10}
    answer, streamed, other = ask(**given, seed=1), ask(**given, seed=1, stream=True), ask(**given, seed=2)
    assert answer == streamed != other
    assert answer.err == "" and answer.text.startswith("To be") and len(answer.text) > len("To be")


# --- streaming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_samples": 3}, {"stop": "4", "max_new_tokens": 20}, {"temperature": 0}])
def test_streamed_bytes_are_those_of_the_whole(ask: Ask, tmp_path: Path, options: dict[str, Any]) -> None:
    """Arbitrary bytes, most of which are no UTF-8: one and the same replacement either way."""
    (tmp_path / "prompts").write_text("\n".join(PROMPTS))
    whole, streamed = (ask(batch=tmp_path / "prompts", seed=5, stream=stream, **options) for stream in (False, True))
    assert streamed == whole
    assert "\ufffd" in whole.text, "the model was meant to say bytes that are no UTF-8"


class Flushes(io.BytesIO):
    """A standard output that remembers where it was flushed."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[bytes] = []

    def flush(self) -> None:
        written = self.getvalue()[sum(map(len, self.pieces)) :]
        if written:
            self.pieces.append(written)


def test_stream_flushes_every_character(ask: Ask, foreign: Path) -> None:
    stream = Flushes()
    stdout = io.TextIOWrapper(stream, encoding="ascii")
    with contextlib.redirect_stdout(stdout):
        ask(model_type=foreign, input_text="n", stream=True, max_new_tokens=200)
    assert stream.pieces == [character.encode() for character in FOREIGN + "\n"]
    stdout.close()


#: Runs example.py so that each step of the model waits for a byte on standard input, from whoever reads the output.
STEPWISE = """
import os, runpy, sys
sys.path.insert(0, {root!r})
import engine
step = engine.Engine.step
def wait(*arguments):
    os.read(0, 1)
    return step(*arguments)
engine.Engine.step = wait
sys.argv = ["example.py", *sys.argv[1:]]
runpy.run_path({example!r}, run_name="__main__")
"""


@pytest.fixture
def stepwise(foreign: Path, engines: Path) -> Callable[[], subprocess.Popen[bytes]]:
    def run() -> subprocess.Popen[bytes]:
        script = STEPWISE.format(root=str(ROOT), example=str(EXAMPLE))
        given = ["--model-type", foreign, "--engine-dir", engines, "--dtype=float32", "--input-text=n", "--stream"]
        return subprocess.Popen(
            [sys.executable, "-c", script, *map(str, given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=ENVIRONMENT,
        )

    return run


def read_character(pipe: IO[bytes]) -> str:
    """What one write brought, which must be one character."""
    ready, _, _ = select.select([pipe], [], [], 120)
    assert ready, "nothing came"
    return os.read(pipe.fileno(), 100).decode()


def test_a_pipe_gets_each_character_as_soon_as_it_is_complete(stepwise: Callable[[], subprocess.Popen[bytes]]) -> None:
    with stepwise() as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        assert read_character(process.stdout) == "n"
        for character in FOREIGN[1:]:
            for _ in character.encode():
                assert not select.select([process.stdout], [], [], 0)[0], "a character came in parts"
                process.stdin.write(b".")
            assert read_character(process.stdout) == character
        process.stdin.write(b".")  # the end of the text
        assert process.stdout.read() == b"\n"
        assert process.stderr.read() == b""
        assert process.wait() == 0


# --- one response, by itself -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def byte_tokenizer(arbitrary: Path) -> tokenizer.Tokenizer:
    return tokenizer.load_tokenizer(arbitrary, EOS + 1)


def expected_response(tokens: Sequence[int], stops: Sequence[str]) -> str:
    """The text before the first stop text that is complete; of several at once, before the one that begins first."""
    decoder, text = codecs.getincrementaldecoder("utf-8")("replace"), ""
    for token in [*itertools.takewhile(lambda token: token != EOS, tokens), None]:
        text += decoder.decode(b"", final=True) if token is None else decoder.decode(bytes([token]))
        begins = [text.index(stop) for stop in stops if stop in text]
        if begins:
            return text[: min(begins)]
    return text


letters = st.sampled_from("aabé")
bytes_of_letters = st.lists(letters).map(lambda text: list("".join(text).encode()))
any_tokens = st.lists(st.one_of(st.sampled_from([*b"aab", *"é€".encode()]), st.integers(0, EOS)), max_size=30)


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.one_of(bytes_of_letters, any_tokens),
    stops=st.lists(st.text(st.sampled_from("abé€\ufffd"), min_size=1, max_size=4), max_size=3),
)
def test_response_never_shows_what_it_must_take_back(
    byte_tokenizer: tokenizer.Tokenizer, tokens: list[int], stops: list[str]
) -> None:
    response = Response(byte_tokenizer, stops, {EOS})
    shown = ""
    for token in tokens:
        shown += response.push(token)
        if response.is_done:
            break
    shown += response.finish()
    assert shown == expected_response(tokens, stops)
    assert response.is_done and response.finish() == ""


# --- engines, reports, streams ---------------------------------------------------------------------------------------


def test_engine_dir_saves_then_opens(ask: Ask, tmp_path: Path) -> None:
    without = ask(input_text="The", seed=1, engine_dir=None)
    folder = tmp_path / "new" / "engines"
    first, second = (ask(input_text="The", seed=1, engine_dir=folder, verbose=True) for _ in range(2))
    (path,) = folder.iterdir()
    assert f"saved {path}\n" in first.err and f"opened {path}\n" in second.err and "saved" not in second.err
    assert first.out == second.out == without.out


def test_verbose(ask: Ask) -> None:
    quiet, verbose = (ask(input_text="The", seed=1, verbose=verbose) for verbose in (False, True))
    assert quiet.out == verbose.out and quiet.err == ""
    assert re.fullmatch(
        r"load \d+\.\d+ s, compile or open \d+\.\d+ s, first token after \d+\.\d+ s, \d+ tokens, \d+\.\d tokens/s, "
        r"peak memory \d+ MB",
        verbose.err.splitlines()[-1],
    )
    assert 10 < int(verbose.err.split()[-2]) < 1e5


def test_verbose_with_a_single_token(ask: Ask) -> None:
    """One token has no rate."""
    found = ask(input_text="The", verbose=True, max_new_tokens=1)
    assert ", 1 token, no rate, peak memory" in found.err


@pytest.fixture
def answer(engines: Path, verse: Path) -> list[object]:
    """Arguments that work."""
    return ["--model-type", verse, "--engine-dir", engines, "--dtype=float32", "--input-text", "The"]


def test_streams_of_a_process(answer: list[object], tmp_path: Path) -> None:
    done = execute(*answer, cwd=tmp_path)
    assert done == Result(0, (VERSE + "\n").encode(), "")
    done = execute(*answer, "--verbose", cwd=tmp_path)
    assert (done.code, done.out) == (0, (VERSE + "\n").encode()) and "tokens/s" in done.err
    assert not list(tmp_path.iterdir()), "it wrote into the folder from which it was run"


def test_output_is_utf8_in_any_locale(answer: list[object], foreign: Path) -> None:
    environment = {**ENVIRONMENT, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}
    done = execute(*answer, "--model-type", foreign, "--input-text", "n", env=environment)
    assert done == Result(0, (FOREIGN + "\n").encode(), "")


def test_interactive_prompt(answer: list[object]) -> None:
    """At a terminal it says what it waits for, and Ctrl-C is an answer."""
    controller, terminal = pty.openpty()
    with start(*answer[:5], stdin=terminal) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == b"Reading the prompt from standard input; end it with Ctrl-D.\n"
        os.write(controller, b"The\n\x04")
        assert process.communicate() == (f"{VERSE}\n".encode(), b"")
    assert process.returncode == 0
    with start(*answer[:5], stdin=terminal) as process:
        assert process.stderr is not None
        process.stderr.readline()
        interrupt(process)
        assert process.communicate() == (b"", b"")
    assert process.returncode == 130
    os.close(controller)
    os.close(terminal)


def test_interrupted_while_it_generates(stepwise: Callable[[], subprocess.Popen[bytes]]) -> None:
    with stepwise() as process:
        assert process.stdout is not None and process.stderr is not None
        assert read_character(process.stdout) == "n"
        interrupt(process)
        assert process.stderr.read() == b""
        assert process.wait() == 130


def test_reader_that_leaves(answer: list[object]) -> None:
    """As in `example.py | true`: no traceback, and nothing else either."""
    for more in ([], ["--stream"], ["--help"]):
        with start(*answer, *more, bufsize=0) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == b""
            assert process.wait() == 1


def test_reader_that_leaves_after_a_byte(stepwise: Callable[[], subprocess.Popen[bytes]]) -> None:
    with stepwise() as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        assert read_character(process.stdout) == "n"
        process.stdout.close()
        process.stdin.write(b"." * 100)
        assert process.stderr.read() == b""
        assert process.wait() == 1


# --- bad input -------------------------------------------------------------------------------------------------------


@dataclass
class Place:
    """Where a bad command is run: its own folder, with the means to make one."""

    folder: Path
    verse: Path
    engines: Path

    def checkpoint(self, edit: Callable[[Path], object]) -> list[object]:
        """A copy of a good checkpoint, edited."""
        copy = self.folder / "checkpoint"
        shutil.copytree(self.verse, copy)
        edit(copy)
        return ["--model-type", copy, "--input-text", "The"]

    def file(self, content: bytes) -> Path:
        path = self.folder / "file"
        path.write_bytes(content)
        return path

    def prompts(self, content: bytes) -> list[object]:
        return ["--batch", self.file(content)]


def overwrite(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


def edit_tensor(name: str, edit: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = np.ascontiguousarray(edit(tensors[name]))
        save_file(tensors, folder / "model.safetensors")

    return apply


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **changes)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


WEIGHTS = "model.safetensors"
PROMPT = ["--input-text", "The"]
#: Name → (arguments, which come after those that name a good checkpoint; pattern of what the message says).
BAD_INPUT: dict[str, tuple[Callable[[Place], Sequence[object]], str]] = {
    "unknown option": (lambda p: [*PROMPT, "--frobnicate"], "--frobnicate"),
    "abbreviated option": (lambda p: [*PROMPT, "--temp=1"], "--temp"),
    "stray argument": (lambda p: [*PROMPT, "a\nb"], "unrecognized arguments: a b"),
    "value missing": (lambda p: [*PROMPT, "--seed"], "--seed: expected one argument"),
    "two sources": (lambda p: [*PROMPT, "--batch", "x"], "--batch: not allowed with argument --input-text"),
    "seed not a number": (lambda p: [*PROMPT, "--seed=one"], "--seed: invalid int value: 'one'"),
    "seed negative": (lambda p: [*PROMPT, "--seed=-1"], "expected a seed from 0 to 18446744073709551615 but got -1"),
    "seed too large": (lambda p: [*PROMPT, f"--seed={2**64}"], "seed from 0 to"),
    "temperature negative": (lambda p: [*PROMPT, "--temperature=-0.1"], "temperature of at least 0 but got -0.1"),
    "temperature nan": (lambda p: [*PROMPT, "--temperature=nan"], "finite temperature .* but got nan"),
    "temperature infinite": (lambda p: [*PROMPT, "--temperature=inf"], "finite temperature .* but got inf"),
    "temperature text": (lambda p: [*PROMPT, "--temperature=hot"], "--temperature: invalid float value: 'hot'"),
    "no threads": (lambda p: [*PROMPT, "--threads=0"], "expected --threads to be at least 1 but got 0"),
    "too many threads": (
        lambda p: [*PROMPT, f"--threads={1 << 40}"],
        f"--threads to be at most 1024 but got {1 << 40}",
    ),
    "top-k negative": (lambda p: [*PROMPT, "--top-k=-1"], "expected --top-k to be at least 0 but got -1"),
    "top-p zero": (lambda p: [*PROMPT, "--top-p=0"], "expected top-p to be above 0 and at most 1 but got 0.0"),
    "top-p two": (lambda p: [*PROMPT, "--top-p=2"], "expected top-p to be above 0 and at most 1 but got 2.0"),
    "top-p nan": (lambda p: [*PROMPT, "--top-p=nan"], "expected top-p to be above 0 and at most 1 but got nan"),
    "num-samples zero": (lambda p: [*PROMPT, "--num-samples=0"], "expected --num-samples to be at least 1 but got 0"),
    "max-new-tokens zero": (lambda p: [*PROMPT, "--max-new-tokens=0"], "--max-new-tokens to be at least 1 but got 0"),
    "stop empty": (lambda p: [*PROMPT, "--stop="], "expected --stop to be a text but got an empty one"),
    "stop not UTF-8": (lambda p: [*PROMPT, b"--stop=\xff"], "expected --stop to be UTF-8 text"),
    "dtype unknown": (lambda p: [*PROMPT, "--dtype=int3"], "--dtype: invalid choice: 'int3' .*float16.*bfloat16"),
    "prompt empty": (lambda p: ["--input-text="], "expected a prompt but got an empty one"),
    "prompt not UTF-8": (lambda p: ["--input-text", b"caf\xe9"], "expected --input-text to be UTF-8 text"),
    "prompt too long": (
        lambda p: ["--input-text", "x" * (CONTEXT + 1)],
        rf"a prompt of at most {CONTEXT} tokens, the model's context, but got {CONTEXT + 1}",
    ),
    "standard input empty": (lambda p: [], "expected a prompt but got an empty one"),
    "prompt file missing": (lambda p: ["--batch", p.folder / "none"], "cannot read .*/none: No such file"),
    "prompt file a folder": (lambda p: ["--batch", p.folder], "cannot read .*: Is a directory"),
    "prompt file not UTF-8": (
        lambda p: p.prompts(b"good\ncaf\xe9\n"),
        "expected UTF-8 text in .*/file but byte 8 is not",
    ),
    "prompt file empty": (lambda p: p.prompts(b""), "expected a prompt on each line of .*/file but the file is empty"),
    "prompt file with an empty line": (lambda p: p.prompts(b"a\n\nb\n"), "got an empty one on line 2 of .*/file"),
    "prompt too long in a file": (
        lambda p: p.prompts(b"a\n" + b"x" * (CONTEXT + 1)),
        rf"at most {CONTEXT} tokens, the model's context, but got {CONTEXT + 1} on line 2 of .*/file",
    ),
    "jsonl without a file": (lambda p: [*PROMPT, "--jsonl"], "expected --batch with --jsonl"),
    "jsonl as a stream": (lambda p: [*p.prompts(b"{}"), "--jsonl", "--stream"], "expected --jsonl or --stream"),
    "output of a text": (lambda p: [*PROMPT, "--output=x"], "expected --jsonl with --output"),
    "jsonl that is none": (lambda p: [*p.prompts(b"The\n"), "--jsonl"], "expected a JSON object on line 1 of .*/file"),
    "jsonl of an empty file": (lambda p: [*p.prompts(b""), "--jsonl"], "JSON object on each line of .*/file but the"),
    "jsonl of a folder": (lambda p: ["--batch", p.folder, "--jsonl"], "cannot read .*: Is a directory"),
    "jsonl over its input": (
        lambda p: [*p.prompts(b"{}"), "--jsonl", "--output", p.folder / "file"],
        "expected --output to name a new file, but .*/file is there already",
    ),
    "guesses by an unknown model": (lambda p: [*PROMPT, "--speculate=gpt5"], "no model 'gpt5'"),
    "guesses by nothing": (lambda p: [*PROMPT, "--speculate="], "expected a checkpoint folder or file at ''"),
    "guesses with another vocabulary": (
        lambda p: [*PROMPT, "--speculate", EMBEDDED_CHECKPOINT],
        "the vocabulary of .*/verse, 257 tokens, but .*/shakespeare has [0-9]+",
    ),
    "model unknown": (lambda p: [*PROMPT, "--model-type=gpt5"], "no model 'gpt5': .*gpt2, gpt2-medium"),
    "model name empty": (lambda p: [*PROMPT, "--model-type="], "expected a checkpoint folder or file at ''"),
    "model folder missing": (lambda p: [*PROMPT, "--model-type=./none"], "'./none', but nothing is there"),
    "model folder of nobody": (lambda p: [*PROMPT, "--model-type=~nobody-there/m"], "but nothing is there"),
    "model name too long": (lambda p: [*PROMPT, f"--model-type=./{'x' * 5000}"], "nothing is there|File name too long"),
    "model a file": (lambda p: [*PROMPT, "--model-type", p.file(b"x")], "or a file of the kind .gguf, .nemo, .pt, got"),
    "model folder empty": (lambda p: [*PROMPT, "--model-type", p.folder], "is not a checkpoint: it has no config.json"),
    "revision with a folder": (
        lambda p: [*PROMPT, "--revision=main"],
        "revision .'main'. was given, but .* is here, not at the hub",
    ),
    "hub not reachable": (
        lambda p: [*PROMPT, "--model-type=gpt2"],
        "'openai-community/gpt2' is not in the cache, and the hub cannot be reached",
    ),
    "weights missing": (lambda p: p.checkpoint(remove(WEIGHTS)), "holds no weights: expected one of model.safetensors"),
    "weights empty": (lambda p: p.checkpoint(overwrite(WEIGHTS, b"")), "is not a readable safetensors file"),
    "weights random": (
        lambda p: p.checkpoint(overwrite(WEIGHTS, np.random.default_rng(0).bytes(10**6))),
        "is not a readable safetensors file",
    ),
    "weights zero": (lambda p: p.checkpoint(overwrite(WEIGHTS, bytes(10**6))), "is not a readable safetensors file"),
    "weights truncated": (lambda p: p.checkpoint(truncate(WEIGHTS, 100_000)), "is not a readable safetensors file"),
    "weights truncated early": (lambda p: p.checkpoint(truncate(WEIGHTS, 100)), "is not a readable safetensors file"),
    "weights of another shape": (
        lambda p: p.checkpoint(edit_tensor("transformer.wpe.weight", lambda old: old[:-1])),
        r"transformer.wpe.weight \(expected \(64, 64\), got \(63, 64\)\)",
    ),
    "weights of another size": (lambda p: p.checkpoint(config(n_embd=32)), "of a wrong shape: .*lm_head.weight"),
    "weights of integers": (
        lambda p: p.checkpoint(edit_tensor("lm_head.weight", lambda old: old.astype(np.int8))),
        r"of a wrong dtype: lm_head.weight \(expected F32, F16, BF16, F64, got I8\)",
    ),
    "weights too large": (
        lambda p: p.checkpoint(edit_tensor("lm_head.weight", lambda old: old * np.float32(1e30))),
        r"lm_head.weight holds 3e\+31, which overflows float16",
    ),
    "weights not numbers": (
        lambda p: p.checkpoint(edit_tensor("lm_head.weight", lambda old: old + np.float32(np.nan))),
        "lm_head.weight holds nan: expected finite numbers",
    ),
    "generation config damaged": (
        lambda p: p.checkpoint(lambda folder: (folder / "generation_config.json").write_text("{")),
        "generation_config.json is not valid JSON",
    ),
    "layers missing": (lambda p: p.checkpoint(config(n_layer=2)), "missing: h.1.ln_1.weight"),
    "config missing": (lambda p: p.checkpoint(remove("config.json")), "it has no config.json"),
    "config not JSON": (lambda p: p.checkpoint(overwrite("config.json", b"{'a': 1}")), "config.json is not valid JSON"),
    "config a list": (
        lambda p: p.checkpoint(overwrite("config.json", b"[]")),
        "expected a JSON object in .*, got a list",
    ),
    "config nested": (lambda p: p.checkpoint(overwrite("config.json", b"[" * 10**5)), "config.json is not valid JSON"),
    "another architecture": (
        lambda p: p.checkpoint(config(model_type="bert", architectures=["BertForMaskedLM"])),
        "expected model_type to be one of .*'gpt2'.*, got \"bert\"",
    ),
    "tokenizer missing": (
        lambda p: p.checkpoint(remove("tokenizer.json")),
        "has neither tokenizer.json nor vocab.json",
    ),
    "tokenizer not JSON": (lambda p: p.checkpoint(overwrite("tokenizer.json", b"\xff")), "is not valid JSON"),
    "tokenizer of another model": (
        lambda p: p.checkpoint(overwrite("tokenizer.json", b'{"model": {"type": "Unigram"}}')),
        "tokenizer.json: expected pre_tokenizer to be of a byte-level BPE tokenizer",
    ),
    "engine folder a file": (lambda p: [*PROMPT, "--engine-dir", p.file(b"x")], "expected a writable engine folder"),
    "engine folder in a file": (
        lambda p: [*PROMPT, "--engine-dir", p.file(b"x") / "engines"],
        "expected a writable engine folder but .*/file/engines is not: Not a directory",
    ),
    "engine folder in /proc": (lambda p: [*PROMPT, "--engine-dir=/proc/engines"], "expected a writable engine folder"),
}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(name: str, tmp_path: Path, verse: Path, engines: Path) -> None:
    """Exit code 2, one line that says what is wrong, nothing on stdout, and nothing written."""
    make, message = BAD_INPUT[name]
    place = Place(tmp_path, verse, engines)
    arguments = [argument if isinstance(argument, bytes) else os.fsencode(str(argument)) for argument in make(place)]
    before = snapshot(tmp_path)
    with socket.socket() as closed:  # bound, so that it is nobody else's, but not listening
        closed.bind(("127.0.0.1", 0))
        environment = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{closed.getsockname()[1]}", "HF_HOME": str(tmp_path / "hub")}
        command = [sys.executable, str(EXAMPLE), f"--model-type={verse}", f"--engine-dir={engines}"]
        done = subprocess.run(
            [*map(os.fsencode, command), *arguments],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
    stderr = done.stderr.decode()
    assert stderr.startswith("example.py: error: ") and stderr.endswith("\n") and stderr.count("\n") == 1, stderr
    assert re.search(message, stderr), stderr
    assert (done.returncode, done.stdout) == (2, b"")
    assert snapshot(tmp_path) == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize("more", [[], ["--stream"], ["--help"]], ids=["whole", "stream", "help"])
def test_standard_output_without_space(answer: list[object], more: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = execute(*answer, *more, stdout=full)
    assert done == Result(2, b"", "example.py: error: standard output: No space left on device\n")


def test_engine_folder_without_space(answer: list[object], tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: the folder can be written to, the engine cannot."""
    folder = tmp_path / "engines"
    limit = 50_000
    done = execute(
        *answer,
        f"--engine-dir={folder}",
        env={**ENVIRONMENT, "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert (done.code, done.out) == (2, b"")
    assert re.fullmatch(rf"example.py: error: cannot save the engine to {folder}/\S+: File too large\n", done.err)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("redirection", "message"), [("<&-", "standard input is closed"), (">&-", "standard output is closed")]
)
def test_closed_streams(answer: list[object], redirection: str, message: str) -> None:
    command = [sys.executable, EXAMPLE, *(answer[:5] if "<" in redirection else answer)]
    done = subprocess.run(
        ["sh", "-c", f'"$@" {redirection}', "sh", *map(str, command)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("example.py: error: ") and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"\xef\xbb\xbfone\r\ntwo\r\n", ["one", "two"]),
        (b"one\r\ntwo\r", ["one", "two"]),
        (b"a\rb\r\n", ["a\rb"]),  # not a line's end
    ],
)
def test_prompts_from_windows(
    content: bytes, prompts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts").write_bytes(content)
    assert generation_options.read_prompts(example.parse_arguments([f"--batch={tmp_path / 'prompts'}"])) == prompts
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert generation_options.read_prompts(example.parse_arguments([])) == ["\n".join(prompts)]


def test_prompt_from_a_pipe_that_is_not_utf8(answer: list[object]) -> None:
    with start(*answer[:5], stdin=subprocess.PIPE) as process:
        out, err = process.communicate(b"caf\xe9\n")
    expected = b"example.py: error: expected UTF-8 text in standard input but byte 3 is not\n"
    assert (process.returncode, out, err) == (2, b"", expected)

"""The marked commands of README.md and docs/ do what is said there (tests/readme_blocks.py has the marks' format)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from readme_blocks import END, RUN, SHOWN, START, Block, ReadmeError, parse

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [*DOCUMENTS, *sorted(ROOT.glob("[!.]*/**/README.md"))]
#: Programs that an earlier block of the same page writes.
WRITTEN = {"gated.py"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_are_well_formed(document: Path) -> None:
    assert parse(document.read_text()) or document.name != "README.md", "README.md marks no command to be run"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 250


@pytest.mark.parametrize("document", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        page = (document.parent / path).resolve() if path else document
        assert page.exists(), f"{document.name} links to {target}, which is not there"
        assert not anchor or anchor in _anchors(page), f"{document.name} links to {target}, a heading that is not there"


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_name_files_that_exist(document: Path) -> None:
    """Those of blocks that are not run, too: programs, settings and requirements."""
    for block in re.findall(r"^```bash\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL):
        made = set(re.findall(r"> ([\w./]+\.py)", block))
        named = set(re.findall(r"(?:python|-r|torchrun \S+|train\.py) ([\w./-]+\.(?:py|txt))", block)) - made
        absent = [name for name in sorted(named) if not (ROOT / name).is_file() and name not in WRITTEN]
        assert not absent, f"{document.name} names {', '.join(absent)}, which is not there"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the working tree."""
    # Tracked files and new ones, but nothing that git ignores: no environment, no caches, no outputs.
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():  # a file deleted since the last commit is listed too
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / name)  # with its time: make compares them
    return tmp_path


def _environment() -> dict[str, str]:
    """This process's environment as a reader's shell has it: the virtual environment activated, and no outer make."""
    made_by_make = ("MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS", "VENV")
    environment = {name: value for name, value in os.environ.items() if name not in made_by_make}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    if (Path(sys.prefix) / ".runtime").exists():
        environment["VENV"] = sys.prefix  # the Makefile made this environment; elsewhere its commands make their own
    return environment


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands(document: Path, checkout: Path) -> None:
    """All blocks of a document, in one place and in their order, as a reader runs them."""
    for block in parse(document.read_text()):
        if "mpirun" in block.script and shutil.which("mpirun", path=_environment()["PATH"]) is None:
            pytest.skip("there is no mpirun: pip install -r requirements/distributed.txt")
        began = time.monotonic()
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.script],
            cwd=checkout,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        place = f"{document.name}:{block.line}"
        assert done.returncode == 0, f"{place} exits with {done.returncode}\n{done.stdout}\n{done.stderr}"
        block.check(done.stdout)
        print(f"{place}: {time.monotonic() - began:.0f} s")


# The parser and the comparison themselves


def _document(
    expected: str | None = None, *, shown: str | None = None, run: bool = True, script: str = "echo 42"
) -> str:
    text = f"# Title\n\n{RUN if run else ''}\n```bash\n{script}\n```\n"
    if expected is not None:
        text += f"\n{START}\n<!--\n```\n{expected}\n```\n-->\n{END}\n"
    if shown is not None:
        text += f"{SHOWN}\n```text\n{shown}\n```\n"
    return text + "\nText.\n"


def test_a_marked_block_is_found() -> None:
    assert parse(_document()) == [Block(3, "echo 42\n")]


def test_shown_output_belongs_to_the_block_before_it() -> None:
    document = _document(shown="first …") + _document() + _document("a")
    assert [(block.expected, block.is_shown) for block in parse(document)] == [
        ("first …", True),
        (None, False),
        ("a", False),
    ]


def test_a_block_without_a_marker_is_not_run() -> None:
    assert parse(_document(run=False)) == []


def test_expected_output_belongs_to_the_block_before_it() -> None:
    document = _document("first") + _document() + _document("a\nb")
    assert [block.expected for block in parse(document)] == ["first", None, "a\nb"]


def test_markers_inside_other_blocks_are_text() -> None:
    assert parse(f"````markdown\n{_document('42')}\n````\n") == []
    assert parse(f"~~~\n{START}\n~~~\n") == []


@pytest.mark.parametrize(
    ("expected", "stdout"),
    [
        ("42", "42\n"),
        ("42\n", "42"),
        (r"The answer is \d+\.", "The answer is 42.\n\n"),
        ("one\ntwo", "one\ntwo\n"),
        ("(?s:.+)", "any\ntext\n"),
    ],
)
def test_matching_output_passes(expected: str, stdout: str) -> None:
    (block,) = parse(_document(expected))
    block.check(stdout)


@pytest.mark.parametrize(
    ("expected", "stdout"),
    [
        ("42", "43\n"),
        ("42", "the 42\n"),
        ("42", "42 and more\n"),
        ("42", ""),
        ("one", "one\ntwo\n"),
        ("one.two", "one\ntwo\n"),
        ("(?s:.+)", ""),
    ],
)
def test_other_output_fails(expected: str, stdout: str) -> None:
    (block,) = parse(_document(expected))
    with pytest.raises(AssertionError, match="does not match"):
        block.check(stdout)


@pytest.mark.parametrize(
    ("shown", "stdout"),
    [
        ("The answer is 42.", "The answer is 42.\n\n"),
        ("…", "any\ntext\n"),
        ("one … three\nfour\n…", "one two three\nfour\nfive\nsix\n"),
        ("[1.0, …]", "[1.0, 2.0]"),
    ],
)
def test_matching_shown_output_passes(shown: str, stdout: str) -> None:
    (block,) = parse(_document(shown=shown))
    block.check(stdout)


@pytest.mark.parametrize(
    ("shown", "stdout"),
    [
        ("42", "43"),
        ("4.", "42"),
        ("…", "\n"),
        ("one …", "one\n"),
        ("one\n…", "two\nthree"),
        ("one … three", "one two"),
    ],
)
def test_other_shown_output_fails(shown: str, stdout: str) -> None:
    (block,) = parse(_document(shown=shown))
    with pytest.raises(AssertionError, match="does not match"):
        block.check(stdout)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (_document("42", run=False), r"^8: expected output that does not follow"),
        (_document("42").replace(END, ""), "Start without its End"),
        (_document("42").replace("-->\n" + END, END), "Start without its End"),
        (_document().replace("```bash", "```python"), "not followed by a ```bash block"),
        (f"{RUN}\n\nText.\n", "not followed by a ```bash block"),
        (f"Text.\n\n{RUN}", "^3: .*not followed by a ```bash block"),
        (f"{RUN}\n```bash\necho 42\n", "^2: this block is never closed"),
        (f"Text.\n{END}\n", "^2: an End without its Start"),
        (_document("42").replace(START, f"Text between.\n{START}"), "does not follow a block"),
        (_document().replace("RUN", "RUNS"), "unknown marker"),
        (_document(shown="42").replace("STDOUT", "OUT"), "unknown marker"),
        (_document(shown="42", run=False), r"^7: expected output that does not follow"),
        (_document(shown="42").replace("```text", "```"), "not followed by a ```text block"),
        (_document(shown="42") + f"{SHOWN}\n```text\n42\n```\n", "does not follow a block"),
        (_document("(42"), "not a regular expression"),
        (f"{RUN}\n```bash\necho\n```\n{START}\n```\n42\n```\n{END}", "not followed by a line '<!--'"),
    ],
)
def test_half_written_markers_are_errors(document: str, message: str) -> None:
    with pytest.raises(ReadmeError, match=message):
        parse(document)

"""corpus.py and the programs data/*/prepare.py, which are a few lines each around it."""

from __future__ import annotations

import importlib.util
import json
import random
import resource
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

tokenizers = pytest.importorskip("tokenizers", reason="preparing data needs requirements/train.txt")

from command_line import UsageError  # noqa: E402
from tokenizer import load_tokenizer  # noqa: E402
from training import corpus  # noqa: E402  it imports tokenizers

ROOT = Path(__file__).resolve().parents[2]
SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
NAMES = ("shakespeare_char", "shakespeare_bpe", "wizard_of_oz_char", "tinystories", "custom")
FILES = {"train.bin", "val.bin", "test.bin", "tokenizer.json", "meta.json"}


def load_prepare(name: str) -> ModuleType:
    """Import a prepare.py, which is a script in a folder that is no package."""
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", ROOT / "data" / name / "prepare.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_text(sentences: int) -> str:
    draw = random.Random(7)
    subjects = ["The king commands", "My lady whispers", "A fool sings", "The café owner waits"]
    places = ["in the castle", "by the river", "at midnight", "before the storm", "without a crown"]
    return "".join(f"{draw.choice(subjects)} {draw.choice(places)}.\n" for _ in range(sentences))


def read_ids(folder: Path, name: str) -> list[int]:
    return np.fromfile(folder / f"{name}.bin", dtype="<u2").tolist()


def run(name: str, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a prepare.py that must fail as bad input does; return its one line of stderr."""
    assert corpus.main(load_prepare(name).CORPUS, argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("prepare.py: error: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


# ---- every prepare.py ------------------------------------------------------------------------------------------------


def test_every_folder_of_data_is_tested_here() -> None:
    assert {path.parent.name for path in ROOT.glob("data/*/prepare.py")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_becomes_parts_that_hold_all_of_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = make_text(900)
    (tmp_path / "input.txt").write_text(text, encoding="utf-8")
    out = tmp_path / "out"
    flags = ["--vocab-size=320"] if name == "shakespeare_bpe" else []
    argv = ["--input", str(tmp_path / "input.txt"), "--output-dir", str(out), *flags]
    assert corpus.main(load_prepare(name).CORPUS, argv) == 0
    assert {file.name for file in out.iterdir()} == FILES
    assert f"train: {int(len(text) * 0.9):,} characters" in capsys.readouterr().out

    meta = json.loads((out / "meta.json").read_text())
    tokenizer = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    parts = {
        part: tokenizer.decode(read_ids(out, part), skip_special_tokens=False) for part in ("train", "val", "test")
    }
    if name.startswith("shakespeare"):  # the published figures are those of the whole last tenth
        assert parts["train"] + parts["val"] == text
        assert parts["test"] == parts["val"]
    else:
        assert parts["train"] + parts["val"] + parts["test"] == text
        assert abs(len(parts["val"]) - len(parts["test"])) <= 1
    for part, held in parts.items():
        assert meta[f"{part}_chars"] == len(held)
        assert meta[f"{part}_tokens"] == len(read_ids(out, part))
    assert meta["vocab_size"] == tokenizer.get_vocab_size() == (320 if flags else len(set(text)))


@pytest.mark.parametrize("name", NAMES)
def test_without_a_network_one_line_says_what_to_do(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = load_prepare(name)
    if hasattr(prepare, "URL"):
        monkeypatch.setattr(prepare, "URL", "http://127.0.0.1:9/input.txt")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert corpus.main(prepare.CORPUS, ["--output-dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "--input" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---- the Shakespeare corpora, against what is published --------------------------------------------------------------


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason=f"{SHAKESPEARE} is not here")
def test_shakespeare_is_split_as_published(tmp_path: Path) -> None:
    """nanoGPT's shakespeare_char: 65 characters in order, 1,003,854 to train on and 111,540 to validate."""
    argv = ["--input", str(SHAKESPEARE), "--output-dir", str(tmp_path)]
    assert corpus.main(load_prepare("shakespeare_char").CORPUS, argv) == 0
    text = SHAKESPEARE.read_text(encoding="utf-8")
    alphabet = sorted(set(text))
    assert len(alphabet) == 65
    assert read_ids(tmp_path, "train") == [alphabet.index(c) for c in text[:1_003_854]]
    assert read_ids(tmp_path, "val") == [alphabet.index(c) for c in text[-111_540:]]


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason=f"{SHAKESPEARE} is not here")
def test_the_embedded_checkpoints_tokenizer_is_made_again(tmp_path: Path) -> None:
    argv = ["--input", str(SHAKESPEARE), "--output-dir", str(tmp_path)]
    assert corpus.main(load_prepare("shakespeare_bpe").CORPUS, argv) == 0
    embedded = ROOT / "checkpoints" / "shakespeare"
    assert (tmp_path / "tokenizer.json").read_bytes() == (embedded / "tokenizer.json").read_bytes()
    ours = load_tokenizer(embedded, 1024)
    assert ours.decode(read_ids(tmp_path, "val")) == (embedded / "held-out.txt").read_text(encoding="utf-8")


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def test_a_bpe_learns_nothing_from_the_held_out_text(tmp_path: Path) -> None:
    head = make_text(300)[:9000]
    learned = []
    for word in ("zyzzyva", "quokkas"):
        corpus.prepare(head + f"{word:<10}" * 100, tmp_path / word, "bpe", 320)
        learned.append((tmp_path / word / "tokenizer.json").read_bytes())
    assert learned[0] == learned[1]
    assert b"king" in learned[0]


def test_any_text_survives_a_bpe() -> None:
    tokenizer = corpus.learn_bpe(make_text(300), 320)
    for text in ("", " ", "\r\n\t\0", "naïve 日本語 🎭 \u200b", "".join(map(chr, range(1, 0x250)))):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("kind", corpus.TOKENIZERS)
@pytest.mark.parametrize("padding", range(1, 20, 3))  # the cuts fall before, into and after a mark
def test_the_end_of_a_document_is_one_token(kind: str, padding: int, tmp_path: Path) -> None:
    text = "a" * padding + f"The king.{corpus.END_OF_TEXT}" * 50
    corpus.prepare(text, tmp_path, kind, 262)
    tokenizer = load_tokenizer(tmp_path, 262)
    ids = [id for part in ("train", "val", "test") for id in read_ids(tmp_path, part)]
    assert ids.count(tokenizer.eos_id) == 50
    assert tokenizer.decode(ids) == text
    if kind == "char":  # the characters of the mark are not in the alphabet
        vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
        assert vocabulary.keys() - {corpus.END_OF_TEXT} == set("a The king.")


# ---- the Wizard of Oz and TinyStories --------------------------------------------------------------------------------


def test_project_gutenbergs_licence_is_not_part_of_the_book() -> None:
    book = (
        "The Project Gutenberg eBook\r\n\r\n*** START OF THE PROJECT GUTENBERG EBOOK THE WIZARD ***\r\n\r\n\r\n"
        "Dorothy lived\r\n*** in ***\r\nKansas.\r\n\r\n"
        "*** END OF THE PROJECT GUTENBERG EBOOK THE WIZARD ***\r\nLicence\r\n"
    )
    strip = load_prepare("wizard_of_oz_char").strip_licence
    assert strip(book) == "Dorothy lived\n*** in ***\nKansas.\n\n"
    assert strip("Dorothy.\n") == "Dorothy.\n"


def test_tinystories_come_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows(list[dict[str, str]]):
        def take(self, count: int) -> list[dict[str, str]]:
            return self[:count]

    def load_dataset(name: str, split: str, streaming: bool) -> Rows:
        assert (name, split, streaming) == ("roneneldan/TinyStories", "train", True)
        return Rows({"text": f"Story {number}."} for number in range(9))

    datasets = ModuleType("datasets")
    datasets.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    prepare = load_prepare("tinystories")
    monkeypatch.setattr(prepare, "STORIES", 2)
    assert prepare.fetch() == "Story 0.<|endoftext|>Story 1."

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto host")

    datasets.load_dataset = fail  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=r"cannot get .* from the hub \(no route\); give a text with --input FILE"):
        prepare.fetch()


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "flags", "complaint"),
    [
        (b"Too short for a BPE of 1024 tokens", ["--tokenizer=bpe"], "the text is too short: its BPE ends at"),
        (b"", [], "the text is too short: 0 characters cannot be split"),
        (b"abcdefghi", [], "the text is too short: 9 characters cannot be split"),
        (b"abc \xff\xfe", [], "input.txt but byte 4 is not"),
        (b"abc", ["--tokenizer=bpe", "--vocab-size=100"], "--vocab-size must be 257 to 65536, not 100"),
        (b"abc", ["--vocab-size=300"], "--vocab-size is for --tokenizer bpe"),
        (b"abcdefghijklmnop", ["--tokenizer=data"], "--tokenizer is char, bpe or a checkpoint, but data cannot"),
        (
            "".join(map(chr, [*range(1, 0xD800), *range(0xE000, 0x11001)])).encode(),
            [],
            "the vocabulary has ids up to 6",
        ),
    ],
)
def test_bad_input_is_told_in_one_line(
    content: bytes, flags: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "input.txt").write_bytes(content)
    out = tmp_path / "out"
    error = run("custom", ["--input", str(tmp_path / "input.txt"), "--output-dir", str(out), *flags], capsys)
    assert complaint in error
    assert not out.exists()


def test_an_alphabet_of_a_checkpoint_names_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus.prepare("abc" * 10, tmp_path / "abc", "char")
    argv = ["--input", str(tmp_path / "text"), "--output-dir", str(tmp_path), "--tokenizer", str(tmp_path / "abc")]
    (tmp_path / "text").write_text("abcé" * 10)
    assert f"the character 'é' (U+00E9) is not among the 3 of {tmp_path / 'abc'}/tokenizer.json\n" in run(
        "custom", argv, capsys
    )
    (tmp_path / "text").write_text("abcéxyz" * 10)
    error = run("custom", argv, capsys)
    assert "'x' (U+0078) is not among" in error and "nor are 3 others" in error
    (tmp_path / "text").write_text("cab" * 10)
    assert corpus.main(load_prepare("custom").CORPUS, argv) == 0


def test_a_corpus_from_windows_is_the_same_corpus(tmp_path: Path) -> None:
    text = make_text(90)
    (tmp_path / "unix").write_bytes(text.encode())
    (tmp_path / "windows").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    made = []
    for name in ("unix", "windows"):
        out = tmp_path / f"{name}.out"
        assert corpus.main(load_prepare("custom").CORPUS, [f"--input={tmp_path / name}", f"--output-dir={out}"]) == 0
        made.append({file.name: file.read_bytes() for file in out.iterdir()})
    assert made[0] == made[1]


def test_a_missing_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot read no-such.txt: No such file" in run("custom", ["--input", "no-such.txt"], capsys)
    assert "required: --input" in run("custom", [], capsys)


def test_a_full_disk_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not even the folder: a dataset of which a part is there looks like one."""
    (tmp_path / "text.txt").write_text(make_text(20_000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # enough for val.bin, too little for train.bin
    try:
        arguments = ["--input", str(tmp_path / "text.txt"), "--output-dir", str(tmp_path / "made" / "data")]
        error = run("custom", arguments, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"cannot write to {tmp_path / 'made' / 'data'}: File too large" in error
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]

"""The tokenizer of a checkpoint, from --tokenizer to the folder of the model that is trained with it: the same ids."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

transformers = pytest.importorskip("transformers", reason="training needs requirements/train.txt")
tokenizers = pytest.importorskip("tokenizers", reason="training needs requirements/train.txt")
pytest.importorskip("torch", reason="training needs requirements/train.txt")

from tokenizers import AddedToken, processors  # noqa: E402

from command_line import UsageError  # noqa: E402
from data.custom import prepare as custom  # noqa: E402
from tokenizer import load_tokenizer  # noqa: E402
from training import corpus  # noqa: E402  these import the three above
from training.batches import SubwordRegularizer, load_dataset  # noqa: E402
from training.building import open_pretrained  # noqa: E402
from training.state import save_model  # noqa: E402
from weight_loader import CheckpointError  # noqa: E402

TIKTOKEN_FILES = Path(__file__).parents[3] / "shared" / "tiktoken"
SENTENCES = ["The king commands. ", "My lady  whispers, \n", "A fool's song<|endoftext|>", "naïve <m> 日本語 "]
TEXT = "".join(random.Random(7).choices(SENTENCES, k=900))


@pytest.fixture(scope="module")
def learned() -> dict[str, Any]:
    """A tokenizer.json, as a dict."""
    content: dict[str, Any] = json.loads(corpus.learn_bpe(TEXT, 300).to_str())
    return content


Write = Callable[..., Path]


@pytest.fixture
def checkpoint(tmp_path: Path, learned: dict[str, Any]) -> Write:
    """Writes the files of a checkpoint without weights: what of tokenizer.json is another, and other files."""

    def write(changes: dict[str, Any] | None = None, **files: dict[str, Any]) -> Path:
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        contents = {"tokenizer": learned | (changes or {}), "config": {"model_type": "gpt2", "vocab_size": 400}}
        for name, content in (contents | files).items():
            (folder / f"{name}.json").write_text(json.dumps(content))
        return folder

    return write


def prepared(tokenizer: Path, folder: Path, text: str = TEXT) -> list[int]:
    """The ids of all parts, as prepare.py writes them."""
    folder.mkdir()
    (folder / "input.txt").write_text(text, encoding="utf-8")
    arguments = [f"--input={folder / 'input.txt'}", f"--output-dir={folder}", f"--tokenizer={tokenizer}"]
    assert corpus.main(custom.CORPUS, arguments) == 0
    return [id for name in ("train", "val", "test") for id in np.fromfile(folder / f"{name}.bin", "<u2").tolist()]


def saved(data: Path, folder: Path) -> tuple[Any, Any]:
    """Our tokenizer and transformers' of the folder that training on `data` leaves."""
    dataset = load_dataset(data, 8)
    config = transformers.GPT2Config(vocab_size=dataset.vocab_size, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    save_model(transformers.GPT2LMHeadModel(config), dataset.description, folder)
    return load_tokenizer(folder, dataset.vocab_size), transformers.AutoTokenizer.from_pretrained(folder)


def check_one_way(tokenizer: Path, tmp_path: Path, theirs: Any, text: str = TEXT) -> None:
    """The ids of the data are transformers' of the checkpoint, and so are those of what is trained on the data."""
    ids = prepared(tokenizer, tmp_path / "data", text)
    parts = corpus.split_text(text, has_test=True).values()

    def encoded(encode: Callable[[str], list[int]]) -> list[int]:
        return [id for part in parts for id in encode(part)]

    assert ids == encoded(lambda part: theirs(part, truncation=False, padding=False)["input_ids"])
    mine, again = saved(tmp_path / "data", tmp_path / "trained")
    assert ids == encoded(mine.encode) == encoded(lambda part: again(part)["input_ids"])


TRUNCATION = {"max_length": 64, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
PADDING = {"strategy": {"Fixed": 5000}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
PADDING |= {"pad_type_id": 0, "pad_token": "<|endoftext|>"}


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "GPT2Tokenizer"])
def test_nothing_is_cut_off_or_filled_up(checkpoint: Write, tmp_path: Path, name: str) -> None:
    """transformers leaves both in tokenizer.json after a call that asked for them."""
    folder = checkpoint({"truncation": TRUNCATION, "padding": PADDING}, tokenizer_config={"tokenizer_class": name})
    check_one_way(folder, tmp_path, transformers.AutoTokenizer.from_pretrained(folder))
    assert json.loads((tmp_path / "trained" / "tokenizer.json").read_text())["truncation"] is None


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "GPT2Tokenizer"])
def test_leading_spaces_and_added_tokens_are_kept(
    checkpoint: Write, learned: dict[str, Any], tmp_path: Path, name: str
) -> None:
    theirs = tokenizers.Tokenizer.from_str(json.dumps(learned))
    theirs.add_tokens([AddedToken("<m>", lstrip=True, rstrip=True, normalized=True), AddedToken("A", single_word=True)])
    byte_level = {**learned["pre_tokenizer"], "add_prefix_space": True}
    changes = {"added_tokens": json.loads(theirs.to_str())["added_tokens"], "pre_tokenizer": byte_level}
    settings = {"tokenizer_class": name, "add_prefix_space": True, "pad_token": "king"}
    folder = checkpoint(changes, tokenizer_config=settings)
    check_one_way(folder, tmp_path, transformers.AutoTokenizer.from_pretrained(folder))


def test_vocab_and_merges_alone(checkpoint: Write, learned: dict[str, Any], tmp_path: Path) -> None:
    folder = checkpoint(vocab=learned["model"]["vocab"])
    merges = "\n".join(" ".join(pair) for pair in learned["model"]["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    (folder / "tokenizer.json").unlink()
    check_one_way(folder, tmp_path, transformers.AutoTokenizer.from_pretrained(folder))


@pytest.mark.skipif(not TIKTOKEN_FILES.is_dir(), reason=f"GPT-2's vocabulary is not at {TIKTOKEN_FILES}")
@pytest.mark.slow
def test_gpt2s_own_without_files(checkpoint: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(TIKTOKEN_FILES))
    folder = checkpoint(config={"model_type": "gpt2"})
    (folder / "tokenizer.json").unlink()
    ids = prepared(folder, tmp_path / "data")
    mine, theirs = saved(tmp_path / "data", tmp_path / "trained")
    assert mine.decode(ids) == TEXT
    assert mine.encode(SENTENCES[2]) == theirs(SENTENCES[2])["input_ids"] == [32, 9192, 338, 3496, 50256]


def test_added_tokens_without_embeddings_are_text(checkpoint: Write, learned: dict[str, Any], tmp_path: Path) -> None:
    theirs = tokenizers.Tokenizer.from_str(json.dumps(learned))
    theirs.add_tokens(["<m>"])
    folder = checkpoint(json.loads(theirs.to_str()), config={"model_type": "gpt2", "vocab_size": 300})
    ids = prepared(folder, tmp_path / "data")
    mine, again = saved(tmp_path / "data", tmp_path / "trained")
    assert max(ids) < 300 and mine.decode(ids) == TEXT
    assert mine.encode("a<m>") == again("a<m>")["input_ids"] == load_tokenizer(folder, 300).encode("a<m>")


@pytest.mark.parametrize("largest", [60_000, 65_535])
def test_a_vocabulary_with_holes(checkpoint: Write, learned: dict[str, Any], tmp_path: Path, largest: int) -> None:
    model = learned["model"]
    last = "".join(model["merges"][-1])
    changed = {**model, "vocab": model["vocab"] | {last: largest}}
    folder = checkpoint({"model": changed}, config={"model_type": "gpt2", "vocab_size": largest + 1})
    check_one_way(folder, tmp_path, transformers.AutoTokenizer.from_pretrained(folder), TEXT + last.replace("Ġ", " "))
    meta = json.loads((tmp_path / "data" / "meta.json").read_text())
    assert meta["vocab_size"] == load_dataset(tmp_path / "data", 8).vocab_size == largest + 1


def refusal(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What prepare.py says, in one line and before it writes anything, about a tokenizer."""
    (tmp_path / "input.txt").write_text(TEXT, encoding="utf-8")
    out = tmp_path / "out"
    arguments = [f"--input={tmp_path / 'input.txt'}", f"--output-dir={out}", f"--tokenizer={folder}"]
    assert corpus.main(custom.CORPUS, arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not out.exists()
    return error


def test_ids_beyond_16_bits_are_told(
    checkpoint: Write, learned: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = learned["model"]
    vocab = model["vocab"] | {"".join(model["merges"][-1]): 70_000}
    folder = checkpoint({"model": {**model, "vocab": vocab}}, config={"model_type": "gpt2", "vocab_size": 70_001})
    error = refusal(folder, tmp_path, capsys)
    assert "the vocabulary has ids up to 70,000, but files of 16 bits hold those up to 65,535" in error


START = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])


@pytest.mark.parametrize(
    ("changes", "files"),
    [
        ({"post_processor": json.loads(START.__getstate__())}, {}),
        ({"normalizer": {"type": "NFC"}}, {}),
        ({"added_tokens": [{"content": 3}]}, {}),
        ({}, {"tokenizer_config": {"tokenizer_class": "GemmaTokenizer"}}),
        ({}, {"tokenizer_config": {"split_special_tokens": True}}),
        ({}, {"config": {"model_type": "gpt2", "vocab_size": 299}}),
    ],
)
def test_what_example_refuses_prepare_refuses(
    checkpoint: Write,
    changes: dict[str, Any],
    files: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = checkpoint(changes, **files)
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    with pytest.raises(CheckpointError) as error:
        load_tokenizer(folder, vocab_size)
    expected = (
        f"prepare.py: error: --tokenizer is char, bpe or a checkpoint, but {folder} cannot be used: {error.value}"
    )
    assert refusal(folder, tmp_path, capsys) == f"{expected}\n"


def test_a_relatives_tokenizer_is_not_for_training(
    checkpoint: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """example.py runs it; a dataset keeps byte-level BPE as GPT-2 has it, or an alphabet."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    steps = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]}
    folder = checkpoint({"pre_tokenizer": steps})
    assert load_tokenizer(folder, 300).encode("12")
    assert "pre_tokenizer.type='Sequence' is not supported, only 'ByteLevel'" in refusal(folder, tmp_path, capsys)


def test_a_folder_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "has neither tokenizer.json nor vocab.json with merges.txt" in refusal(tmp_path, tmp_path, capsys)


def test_dropout_leaves_the_ends_of_documents_whole(checkpoint: Write, tmp_path: Path) -> None:
    prepared(checkpoint(), tmp_path / "data")
    data = load_dataset(tmp_path / "data", 8)
    for p in (0.0, 0.5):
        ids = SubwordRegularizer(data, p, seed=1).epoch(np.random.default_rng(0))
        assert (ids == data.eos_token_id).sum() == (data.train == data.eos_token_id).sum() > 0
        assert data.tokenizer.decode(ids.tolist()) == data.tokenizer.decode(data.train.tolist())
        assert (len(ids) > len(data.train)) is (p > 0)


def test_finetuning_wants_the_checkpoints_tokenizer(checkpoint: Write, learned: dict[str, Any], tmp_path: Path) -> None:
    """Equal in all that decides ids: not the vocabulary alone."""
    folder = checkpoint(tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"})
    config = transformers.GPT2Config(vocab_size=400, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    prepared(folder, tmp_path / "data")
    data = load_dataset(tmp_path / "data", 8)
    open_pretrained(str(folder), 8, data, {})
    learned = {**learned, "pre_tokenizer": {**learned["pre_tokenizer"], "add_prefix_space": True}}
    (folder / "tokenizer.json").write_text(json.dumps(learned))
    with pytest.raises(UsageError, match="the dataset's tokenizer is not that of"):
        open_pretrained(str(folder), 8, data, {})

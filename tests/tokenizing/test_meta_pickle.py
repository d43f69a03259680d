"""nanoGPT's meta.pkl: the ids that nanoGPT gives, and nothing is executed."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import fuzzing, mutated_bytes

from tokenizer import StreamDecoder, UnknownCharacterError, load_tokenizer
from tokenizing.sources import MetaPickle
from weight_loader import CheckpointError

TEXT = "To be, or not to be:\n\tthat is the question — naïve 中文 👩‍👩‍👧 e\u0301\x00"


def meta(text: str = TEXT) -> dict[str, Any]:
    """What nanoGPT's data/shakespeare_char/prepare.py writes."""
    chars = sorted(set(text))
    stoi = {ch: i for i, ch in enumerate(chars)}
    return {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": stoi}


def write(path: Path, value: object, protocol: int = pickle.DEFAULT_PROTOCOL) -> MetaPickle:
    path.write_bytes(pickle.dumps(value, protocol))
    return MetaPickle(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_equals_nanogpt(tmp_path: Path, protocol: int) -> None:
    value = meta()
    tokenizer = load_tokenizer(write(tmp_path / "meta.pkl", value, protocol), 100)
    stoi, itos = value["stoi"], value["itos"]
    for text in ("", "be", TEXT, TEXT[::-1]):
        ids = [stoi[c] for c in text]
        assert tokenizer.encode(text) == [id for part in tokenizer.encode_in_parts(text) for id in part] == ids
        assert tokenizer.decode(ids) == "".join(itos[i] for i in ids) == text
        stream = StreamDecoder(tokenizer)
        assert [stream.push(id) for id in ids] == list(text)
    assert tokenizer.eos_id is None and tokenizer.prefix == ()
    with pytest.raises(UnknownCharacterError, match=r"'z' \(U\+007A\) is not among the \d+ of"):
        tokenizer.encode("buzz")


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.path, "executed"))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_is_executed(tmp_path: Path, protocol: int) -> None:
    trace = tmp_path / "trace"
    source = write(tmp_path / "meta.pkl", {**meta(), "more": Evil(trace)}, protocol)
    pickle.loads(source.path.read_bytes())
    assert trace.read_text() == "executed"
    trace.unlink()
    with pytest.raises(CheckpointError, match="which may execute something") as error:
        load_tokenizer(source, 100)
    assert "\n" not in str(error.value) and not trace.exists()


STOI = {"a": 0, "b": 1}
ITOS = {0: "a", 1: "b"}
LAUGHS: list[object] = []
for _ in range(100):
    LAUGHS = [LAUGHS] * 10  # whose repr would be 10 to the power of 100 characters
BAD: list[tuple[object, str]] = [
    ([1], "expected a dictionary with stoi"),
    (LAUGHS, "expected a dictionary with stoi"),
    ({"stoi": LAUGHS}, "expected a dictionary with stoi"),
    ({"stoi": {"a": LAUGHS}}, "expected stoi to number characters"),
    ({"vocab_size": 2}, "expected a dictionary with stoi"),
    ({"stoi": {}, "itos": {}}, "expected a dictionary with stoi"),
    ({"stoi": {"ab": 0}, "itos": {0: "ab"}}, "expected stoi to number characters, got ('ab', 0)"),
    ({"stoi": {"a": True}, "itos": {1: "a"}}, "expected stoi to number characters"),
    ({"stoi": {1: 0}, "itos": ITOS}, "expected stoi to number characters"),
    ({"stoi": {"a": 7}, "itos": {7: "a"}}, "numbers 'a' 7, but the model's vocabulary has 7"),
    ({"stoi": {"a": -1}, "itos": {-1: "a"}}, "to number characters from 0, got ('a', -1)"),
    ({"stoi": {"a": 10**5000}, "itos": {10**5000: "a"}}, "numbers 'a' a int"),
    ({"stoi": {"a": 0, "b": 0}, "itos": {0: "b"}}, "a number of its own"),
    ({"stoi": STOI, "itos": {0: "b", 1: "a"}}, "itos to be the inverse"),
    ({"stoi": STOI}, "itos to be the inverse"),
    (OrderedDict(stoi=STOI, itos=ITOS), "which may execute something"),
]


@pytest.mark.parametrize(("value", "message"), BAD, ids=[f"{n}-{message}" for n, (_, message) in enumerate(BAD)])
def test_other_values_are_refused(tmp_path: Path, value: object, message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load_tokenizer(write(tmp_path / "meta.pkl", value), 7)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="cannot read"):
            load_tokenizer(MetaPickle(path), 7)


def test_damaged_files(tmp_path: Path) -> None:
    """Of a damaged file either a sound alphabet is read, or one line tells what is wrong."""
    path, sound = tmp_path / "meta.pkl", pickle.dumps(meta())
    read = 0

    @fuzzing(2000)
    @given(st.data())
    def fuzz(data: st.DataObject) -> None:
        nonlocal read
        path.write_bytes(data.draw(st.one_of(st.binary(max_size=40), st.just(None))) or mutated_bytes(data.draw, sound))
        try:
            load_tokenizer(MetaPickle(path), 100)
            read += 1
        except CheckpointError as error:
            assert str(error) and "\n" not in str(error)

    fuzz()
    assert read > 20

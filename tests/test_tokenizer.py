"""tokenizer.py against HuggingFace's tokenizers and transformers, on arbitrary text."""

from __future__ import annotations

import json
import os
import random
import shutil
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from selection import partly_slow
from tokenizer_texts import CORPUS, FRAGMENTS, PROPERTY, TEXT
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import tokenizer as ours
from tokenizer import GPT2_VOCAB_SIZE, StreamDecoder, load_tokenizer
from tokenizing.byte_pairs import build_byte_pairs
from tokenizing.description import NotModelled, from_json, to_json, write_json
from weight_loader import CheckpointError

TIKTOKEN_FILES = Path(__file__).parents[2] / "shared" / "tiktoken"


def trained(vocab_size: int = 390, special: tuple[str, ...] = ("<|endoftext|>",), **byte_level: Any) -> Tokenizer:
    """A byte-level BPE trained by HuggingFace's own trainer, whose special tokens come first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **byte_level})
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def edited(tokenizer: Tokenizer, folder: Path, **changes: Any) -> Path:
    """A tokenizer.json with some values replaced; "model.merges" is the merges of the model."""
    raw = json.loads(tokenizer.to_str())
    for path, value in changes.items():
        *outer, last = path.split("__")
        target = raw
        for key in outer:
            target = target[key]
        target[last] = value
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    return folder


def check_equal(mine: ours.Tokenizer, theirs: Tokenizer, text: str) -> None:
    ids = mine.encode(text)
    assert ids == theirs.encode(text).ids
    assert mine.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


# --- equality with HuggingFace ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2's own vocabulary as vocab.json and merges.txt."""
    if not TIKTOKEN_FILES.is_dir():
        pytest.skip(f"GPT-2's vocabulary is not at {TIKTOKEN_FILES}")
    folder = tmp_path_factory.mktemp("gpt2")
    for file in TIKTOKEN_FILES.iterdir():
        shutil.copyfile(file, folder / ("vocab.json" if file.read_bytes()[:1] == b"{" else "merges.txt"))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    return folder


@pytest.fixture(scope="module")
def gpt2(gpt2_folder: Path) -> tuple[ours.Tokenizer, Any]:
    """Our tokenizer and transformers' of GPT-2's files."""
    from transformers import AutoTokenizer

    return load_tokenizer(gpt2_folder, GPT2_VOCAB_SIZE), AutoTokenizer.from_pretrained(gpt2_folder)


@PROPERTY
@given(text=TEXT)
def test_gpt2_equals_transformers(gpt2: tuple[ours.Tokenizer, Any], text: str) -> None:
    mine, theirs = gpt2
    ids = mine.encode(text)
    assert ids == theirs(text)["input_ids"]
    assert mine.decode(ids) == text == theirs.decode(ids)


@PROPERTY
@given(ids=st.lists(st.integers(0, GPT2_VOCAB_SIZE + 40), max_size=30))
def test_any_ids_decode_and_stream_like_transformers(gpt2: tuple[ours.Tokenizer, Any], ids: list[int]) -> None:
    mine, theirs = gpt2
    whole = mine.decode(ids)
    assert whole == theirs.backend_tokenizer.decode(ids, skip_special_tokens=False)
    stream = StreamDecoder(mine)
    pieces = [stream.push(id) for id in ids]
    assert "".join(pieces) + stream.flush() == whole


def test_gpt2_real_text(gpt2: tuple[ours.Tokenizer, Any]) -> None:
    mine, theirs = gpt2
    for file in ("tinyshakespeare.txt", "wizard-of-oz.txt"):
        path = TIKTOKEN_FILES.parent / "data" / file
        if not path.is_file():
            pytest.skip(f"{path} is absent")
        text = path.read_text(encoding="utf-8")[:200_000]
        assert mine.encode(text) == theirs(text)["input_ids"]


def test_gpt2_without_files_is_tiktokens(gpt2: tuple[ours.Tokenizer, Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(TIKTOKEN_FILES))
    for vocab_size in (GPT2_VOCAB_SIZE, 50304):
        bare = load_tokenizer(tmp_path, vocab_size)
        text = "Hello <|endoftext|> world, it's 42 ☃"
        assert bare.encode(text) == gpt2[0].encode(text)
        assert bare.decode(bare.encode(text)) == text
        assert bare.eos_id == gpt2[0].eos_id == 50256


def test_gpt2_without_files_or_network(tmp_path: Path, monkeypatch: Any) -> None:
    import tiktoken.registry

    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    for scheme in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(scheme, "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(CheckpointError, match="no tokenizer files, and GPT-2's cannot be had"):
        load_tokenizer(tmp_path, GPT2_VOCAB_SIZE)


BYTE_LEVEL = [{"add_prefix_space": prefix, "use_regex": regex} for prefix in (False, True) for regex in (True, False)]


@pytest.fixture(scope="module", params=BYTE_LEVEL, ids=lambda flags: "-".join(k for k, v in flags.items() if v))
def small(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[ours.Tokenizer, Tokenizer]:
    """A small trained tokenizer with a padding token and with ids that are not in the order of the merges."""
    theirs = trained(**request.param)
    theirs.add_tokens([AddedToken("<pad>", normalized=True), AddedToken("<|end", normalized=True)])
    raw = json.loads(theirs.to_str())
    ids = list(raw["model"]["vocab"].values())
    random.Random(1).shuffle(ids)
    renamed = dict(zip(raw["model"]["vocab"].values(), ids, strict=True))
    raw["model"]["vocab"] = {token: renamed[id] for token, id in raw["model"]["vocab"].items()}
    for token in raw["added_tokens"]:
        token["id"] = renamed.get(token["id"], token["id"])
    theirs = Tokenizer.from_str(json.dumps(raw))
    folder = save(theirs, tmp_path_factory.mktemp("small"))
    return load_tokenizer(folder, theirs.get_vocab_size() + 8), theirs


@PROPERTY
@given(text=TEXT)
def test_trained_equals_tokenizers(small: tuple[ours.Tokenizer, Tokenizer], text: str) -> None:
    check_equal(*small, text)


@PROPERTY
@given(ids=st.lists(st.integers(0, 400), max_size=30))
def test_trained_decodes_any_ids(small: tuple[ours.Tokenizer, Tokenizer], ids: list[int]) -> None:
    mine, theirs = small
    assert mine.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("add_prefix_space", [False, True])
@pytest.mark.parametrize("wrapper", ["GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_saved_by_transformers(tmp_path: Path, wrapper: str, add_prefix_space: bool) -> None:
    import transformers

    backend = trained(add_prefix_space=add_prefix_space)
    if wrapper == "GPT2Tokenizer":
        model = json.loads(backend.to_str())["model"]
        merges = [tuple(pair) for pair in model["merges"]]
        saved = transformers.GPT2Tokenizer(vocab=model["vocab"], merges=merges, add_prefix_space=add_prefix_space)
    else:
        saved = transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token="<|endoftext|>", add_prefix_space=add_prefix_space
        )
    saved.add_tokens(["<pad>"])
    saved.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    mine = load_tokenizer(tmp_path, len(theirs))
    for text in ["", " ", *FRAGMENTS, "".join(FRAGMENTS), *CORPUS]:
        ids = mine.encode(text)
        assert ids == theirs(text)["input_ids"], text
        assert mine.decode(ids) == theirs.decode(ids)
    assert mine.eos_id == theirs.eos_token_id


def test_tokenizer_json_of_merges_as_strings(tmp_path: Path) -> None:
    theirs = trained()
    merges = [" ".join(pair) for pair in json.loads(theirs.to_str())["model"]["merges"]]
    mine = load_tokenizer(edited(theirs, tmp_path, model__merges=merges), 390)
    check_equal(mine, theirs, CORPUS[0])


def test_added_token_beyond_the_embeddings_is_plain_text(tmp_path: Path) -> None:
    theirs = trained()
    folder = save(theirs, tmp_path / "with")
    plain = load_tokenizer(folder, 390).encode("a<pad>b")
    theirs.add_special_tokens(["<pad>"])
    folder = save(theirs, tmp_path / "beyond")
    assert load_tokenizer(folder, 390).encode("a<pad>b") == plain
    assert load_tokenizer(folder, 391).encode("a<pad>b") == theirs.encode("a<pad>b").ids


def test_added_token_outside_ascii_round_trips(tmp_path: Path) -> None:
    """tokenizers decodes such a token to U+FFFD, through the byte alphabet; its text is what was meant."""
    theirs = trained()
    theirs.add_special_tokens(["<é>"])
    mine = load_tokenizer(save(theirs, tmp_path), 391)
    assert mine.encode("x<é>y") == theirs.encode("x<é>y").ids
    assert mine.decode(mine.encode("x<é>y")) == "x<é>y"


# --- merges that are not those of a trained vocabulary ---------------------------------------------------------------


@settings(PROPERTY, max_examples=300)
@given(data=st.data())
def test_any_merges(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Arbitrary merges over a few letters: many of the tokens are unreachable, and some texts tempt tiktoken."""
    tokens, merges = list("abc"), []
    for _ in range(data.draw(st.integers(1, 14))):
        left, right = data.draw(st.sampled_from(tokens)), data.draw(st.sampled_from(tokens))
        if left + right not in tokens and len(left + right) < 12:
            tokens.append(left + right)
            merges.append((left, right))
    orphans = [t for t in data.draw(st.lists(st.text("abc", min_size=2, max_size=4), max_size=2)) if t not in tokens]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = list(dict.fromkeys([*orphans, *alphabet, *reversed(tokens)]))
    theirs = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    mine = load_tokenizer(save(theirs, tmp_path_factory.getbasetemp() / "merges"), len(vocabulary))
    for text in [*tokens, *orphans, *data.draw(st.lists(st.text("abc", max_size=30), min_size=5, max_size=5))]:
        check_equal(mine, theirs, text)


@pytest.mark.parametrize(
    ("merges", "fault"),
    [
        ([("ab", "c"), ("a", "b")], "comes before what makes its parts"),
        ([("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")], "makes a token for the second time"),
    ],
)
def test_merges_out_of_order_are_not_tiktokens(tmp_path: Path, merges: list[tuple[str, str]], fault: str) -> None:
    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "bc", "abc"]
    theirs = trained()
    vocab = {token: id for id, token in enumerate(vocabulary)}
    folder = edited(theirs, tmp_path, model__vocab=vocab, model__merges=merges, added_tokens=[])
    with pytest.raises(NotModelled, match=fault):
        build_byte_pairs(ours.describe(folder, 300))
    mine, theirs = load_tokenizer(folder, 300), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("abc", "ab c", "aabcbc", "cab"):
        check_equal(mine, theirs, text)


# --- alphabets: a token for each character ---------------------------------------------------------------------------

LETTERS = "\n !'-ABCabcé—中\U0001f600\u200d\u0301"


def alphabet(special: tuple[str, ...] = ()) -> Tokenizer:
    theirs = Tokenizer(models.WordLevel({letter: number for number, letter in enumerate(LETTERS)}, unk_token="<unk>"))
    theirs.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    theirs.decoder = decoders.Fuse()
    theirs.add_special_tokens(list(special))
    return theirs


@pytest.fixture(scope="module")
def spelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[ours.Tokenizer, Any]:
    """Our tokenizer and transformers' of an alphabet's files, as train.py writes them."""
    from transformers import AutoTokenizer

    folder = save(alphabet(("<|endoftext|>",)), tmp_path_factory.mktemp("alphabet"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return load_tokenizer(folder, 20), AutoTokenizer.from_pretrained(folder)


@PROPERTY
@given(text=st.lists(st.sampled_from([*LETTERS, "<|endoftext|>"]), max_size=40).map("".join))
def test_alphabet_equals_transformers(spelled: tuple[ours.Tokenizer, Any], text: str) -> None:
    mine, theirs = spelled
    ids = mine.encode(text)
    assert ids == theirs(text)["input_ids"]
    assert len(ids) == len(text.replace("<|endoftext|>", "x"))
    assert mine.decode(ids) == text == theirs.decode(ids)
    stream = StreamDecoder(mine)
    assert [stream.push(id) for id in ids] == [mine.decode([id]) for id in ids]
    assert stream.flush() == ""


def test_alphabet_has_the_end_that_its_files_name(spelled: tuple[ours.Tokenizer, Any], tmp_path: Path) -> None:
    assert spelled[0].eos_id == spelled[1].eos_token_id == len(LETTERS)
    assert load_tokenizer(save(alphabet(), tmp_path), 20).eos_id is None
    assert spelled[0].decode([0, 19, 500, 5]) == "\nA"  # a padded vocabulary has ids without a token


@pytest.mark.parametrize(
    ("text", "name"),
    [("abcd", r"'d' \(U\+0064\)"), ("a\tb", r"'\\t' \(U\+0009\)"), ("<|", r"'<' \(U\+003C\)"), ("\ud800", r"U\+D800")],
)
def test_character_outside_the_alphabet_is_named(spelled: tuple[ours.Tokenizer, Any], text: str, name: str) -> None:
    with pytest.raises(ours.UnknownCharacterError, match=f"the character .*{name}.* is not among the 17 of") as error:
        spelled[0].encode(text)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder": {"type": "WordPiece"}}, "decoder.type='WordPiece' is not supported"),
        ({"decoder": None}, "decoder.type=None is not supported"),
        ({"model__vocab": {"a": 0, "bc": 1}}, "expected each token to be one character, got 'bc'"),
        ({"model__vocab": {"a": 0, "": 1}}, "expected each token to be one character, got ''"),
        ({"model__vocab": {"a": 0, "b": 0}}, "distinct ids"),
        ({"model__vocab": ["a"]}, "distinct ids"),
        ({"model__vocab": {"a": 20}}, "has ids up to 20, but the model's vocabulary has 20"),
    ],
)
def test_other_word_level_tokenizers_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load_tokenizer(edited(alphabet(), tmp_path, **changes), 20)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}},
        {"model__unk_token": "a"},
        {"normalizer": {"type": "NFC"}},
    ],
    ids=str,
)
def test_alphabets_with_other_rules_equal_tokenizers(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = edited(alphabet(), tmp_path, **changes)
    mine, theirs = load_tokenizer(folder, 20), Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = {"normalizer": "abe\u0301", "model__unk_token": "xyz"}.get(next(iter(changes)), "abc")
    check_equal(mine, theirs, text)


# --- which class reads the files, and the leading space --------------------------------------------------------------

ABSENT = "absent"
CLASSES = [
    *[ABSENT, None, "GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"],
    *["PreTrainedTokenizer", "BloomTokenizerFast"],
]
OTHER_CLASSES = ["GemmaTokenizer", "BertTokenizerFast", "RobertaTokenizer", "CodeGenTokenizer", "GPTNeoXTokenizerFast"]
OTHER_CLASSES += ["Qwen2Tokenizer", "NobodysTokenizer"]


def write_settings(
    folder: Path, name: str | None, prefix: bool | None, config: dict[str, Any] | None, in_json: bool = False
) -> Path:
    """A folder whose files say in several places which class reads it and whether a text begins with a space."""
    theirs = trained(add_prefix_space=in_json)
    theirs.add_tokens(["<m>"])
    save(theirs, folder)
    if name != ABSENT:
        settings = {"tokenizer_class": name, "add_prefix_space": prefix}
        content = json.dumps({key: value for key, value in settings.items() if value is not None})
        (folder / "tokenizer_config.json").write_text(content)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "config",
    partly_slow([None, {"n_layer": 1}, {"model_type": "gpt2"}, {"model_type": "gpt_neo"}], [{"n_layer": 1}]),
    ids=str,
)
@pytest.mark.parametrize("in_json", [False, True])
def test_class_and_leading_space_are_transformers(tmp_path: Path, in_json: bool, config: dict[str, Any] | None) -> None:
    from transformers import AutoTokenizer

    texts = ["Hello the", " Hello", "the<m>the <m> the", "", "a<|endoftext|>b", "<m>", "  x"]
    compared = 0
    for name in CLASSES:
        for prefix in (None,) if name == ABSENT else (None, False, True):
            folder = write_settings(tmp_path / f"{name}-{prefix}", name, prefix, config, in_json)
            theirs, mine = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder, 391)
            for text in texts:
                assert mine.encode(text) == theirs(text)["input_ids"], (name, prefix, text)
            compared += 1
    assert compared == 22  # of 176 settings in all


def test_the_class_may_be_named_in_config_json(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for name in ("GPT2TokenizerFast", "PreTrainedTokenizerFast"):
        config = {"model_type": "gpt2", "tokenizer_class": name}
        folder = write_settings(tmp_path / name, ABSENT, None, config, in_json=True)
        assert load_tokenizer(folder, 391).encode("the") == AutoTokenizer.from_pretrained(folder)("the")["input_ids"]


@pytest.mark.parametrize("name", [*OTHER_CLASSES, 3, ["GPT2Tokenizer"]], ids=str)
def test_other_classes_are_refused_by_name(tmp_path: Path, name: Any) -> None:
    places = ((name, None, {"model_type": "gpt2"}), (ABSENT, None, {"tokenizer_class": name}))
    for number, place in enumerate(places):
        folder = write_settings(tmp_path / str(number), *place)
        with pytest.raises(CheckpointError) as error:
            load_tokenizer(folder, 391)
        assert f"tokenizer_class={name!r} is not supported, only GPT2Tokenizer, LlamaTokenizer and" in str(error.value)


@pytest.mark.parametrize("model_type", ["bert", "", 3, {"a": 1}])
def test_other_models_are_refused_by_name(tmp_path: Path, model_type: object) -> None:
    folder = write_settings(tmp_path, ABSENT, None, {"model_type": model_type})
    with pytest.raises(CheckpointError) as error:
        load_tokenizer(folder, 391)
    assert f"or that of a relative, for its tokenizer, got {model_type!r}" in str(error.value)


def test_an_alphabet_is_nothing_for_gpt2s_class(tmp_path: Path) -> None:
    folder = save(alphabet(), tmp_path)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(CheckpointError, match="expected tokenizer_class PreTrainedTokenizerFast"):
        load_tokenizer(folder, 20)


# --- added tokens ----------------------------------------------------------------------------------------------------

#: White space and letters of all kinds, beside which tokens may stand: what \\s and \\w are differs among libraries.
BESIDE = [
    *" \t\n\r\x0b\x0c\x1c\x85\xa0\u1680\u2003\u2028\u3000\u200b\u180e",
    *"aZ_9é٣½Ⅷ中\u0301\u200d\u203f-.'",
    "\U00010400",
]
CONTENTS = ["<m>", "<m", "m>", "<m><m>", "[x]", "x", " <s>", "<s> ", "\t", "é", "the", "<|endoftext|>"]
ADDED = st.lists(
    st.builds(
        AddedToken,
        content=st.sampled_from(CONTENTS),
        single_word=st.booleans(),
        lstrip=st.booleans(),
        rstrip=st.booleans(),
        normalized=st.booleans(),
        special=st.booleans(),
    ),
    min_size=1,
    max_size=6,
)


@settings(PROPERTY, max_examples=200)
@given(added=ADDED, data=st.data(), prefix=st.booleans())
def test_added_tokens_equal_tokenizers(
    added: list[AddedToken], data: st.DataObject, prefix: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    theirs = small_bpe(prefix)
    theirs.add_tokens(added)
    folder = save(theirs, tmp_path_factory.getbasetemp() / "added")
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    mine = load_tokenizer(folder, 400)
    pieces = st.lists(st.sampled_from([*BESIDE, *CONTENTS]), max_size=12).map("".join)
    for text in data.draw(st.lists(pieces, min_size=5, max_size=5)):
        try:
            ids = theirs.encode(text).ids
        except BaseException as error:  # a panic: two tokens claim the same white space
            assert type(error).__name__ == "PanicException"
            continue
        assert mine.encode(text) == ids, text


@cache
def _trained_json(prefix: bool) -> str:
    return trained(add_prefix_space=prefix).to_str()


def small_bpe(prefix: bool) -> Tokenizer:
    return Tokenizer.from_str(_trained_json(prefix))


def test_white_space_and_word_characters_are_those_of_tokenizers(tmp_path: Path) -> None:
    """Each character that Python's Unicode knows, beside a token that takes white space, and one that stands alone."""
    theirs = small_bpe(False)
    theirs.add_tokens(
        [AddedToken("[l]", lstrip=True), AddedToken("[r]", rstrip=True), AddedToken("[w]", single_word=True)]
    )
    mine = load_tokenizer(save(theirs, tmp_path), 400)
    letters = [chr(code) for code in range(0x3000) if unicodedata.category(chr(code)) != "Cn"]
    texts = [f"{letter}[l][r]{letter}[w].{letter}.[w]{letter}" for letter in letters]
    assert [mine.encode(text) for text in texts] == [each.ids for each in theirs.encode_batch(texts)]


def test_a_token_that_is_listed_with_another_id_gets_its_own(tmp_path: Path) -> None:
    """As with `tokenizers`, which numbers added tokens itself."""
    theirs = trained()
    listed = [{"content": "<|endoftext|>", "id": 7}, {"content": "<m>", "id": 1000}, {"content": "<n>", "id": 3}]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    folder = edited(theirs, tmp_path, added_tokens=[{**token, **flags} for token in listed])
    check_equal(load_tokenizer(folder, 392), Tokenizer.from_file(str(folder / "tokenizer.json")), "<|endoftext|><m><n>")


def test_a_hole_where_an_added_token_would_go_is_told(tmp_path: Path) -> None:
    vocab = json.loads(trained().to_str())["model"]["vocab"]
    last = max(vocab, key=lambda token: vocab[token])
    theirs = trained()
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    added = [{"content": "<m>", "id": 390, **flags}]
    folder = edited(theirs, tmp_path, model__vocab={**vocab, last: 390, "zz": 391}, added_tokens=added)
    del vocab[last]
    with pytest.raises(CheckpointError, match="the added token '<m>' gets the id 391, which is that of 'zz'"):
        load_tokenizer(folder, 500)


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("is_new", [True, False])
def test_special_tokens_beside_the_vocabulary(tmp_path: Path, name: str, is_new: bool) -> None:
    """In the format that has added_tokens_decoder, and in the older one, which has more files."""
    from transformers import AutoTokenizer

    theirs = trained()
    theirs.add_tokens([AddedToken("<m>", normalized=True, rstrip=True)])
    folder = save(theirs, tmp_path)
    flags = {"lstrip": False, "rstrip": True, "normalized": False, "single_word": False, "special": False}
    eos = {"__type": "AddedToken", "content": "</s>", **flags}
    settings = {"tokenizer_class": name, "image_token": "<img>", "pad_token": None, "add_prefix_space": True}
    if is_new:
        decoder = {"391": {"content": "<x>", **flags}, "390": {"content": "<m>", **flags, "lstrip": True}}
        settings |= {"eos_token": eos, "added_tokens_decoder": decoder, "additional_special_tokens": ["<a>", "<b>"]}
    else:
        more = {"eos_token": {key: value for key, value in eos.items() if key != "__type"}, "unk_token": "<u>"}
        content = json.dumps({**more, "additional_special_tokens": ["<a>", "<b>"]})
        (folder / "special_tokens_map.json").write_text(content)
        (folder / "added_tokens.json").write_text(json.dumps({"<y>": 393, "<x>": 392}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    reference = AutoTokenizer.from_pretrained(folder)
    mine = load_tokenizer(folder, len(reference))
    for text in ("a <m> <x>  <y> b", "<a>b<b> </s> \n<u><img>c", "<|endoftext|>"):
        assert mine.encode(text) == reference(text)["input_ids"]
    assert mine.eos_id == reference.eos_token_id is not None


# --- a description, and the file that says all of it -----------------------------------------------------------------


def test_gpt2s_description_is_that_of_its_files(gpt2_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(TIKTOKEN_FILES))
    bare = ours.describe(tmp_path, GPT2_VOCAB_SIZE)
    given = ours.describe(gpt2_folder, GPT2_VOCAB_SIZE)
    assert (bare.vocabulary, bare.merges) == (given.vocabulary, given.merges)
    assert [(token.content, token.id) for token in bare.added] == [(token.content, token.id) for token in given.added]


@settings(PROPERTY, max_examples=60)
@given(added=ADDED, prefix=st.booleans())
def test_what_is_written_is_what_was_read(
    added: list[AddedToken], prefix: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    theirs = small_bpe(prefix)
    theirs.add_tokens(added)
    description = from_json(Path("here"), json.loads(theirs.to_str()))
    text = write_json(to_json(description))
    assert from_json(Path("there"), json.loads(text)) == description
    assert Tokenizer.from_str(text).to_str() == text


# --- refusals --------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model__type": "Unigram"}, "cannot read this tokenizer: invalid type: map, expected a sequence"),
    ({"model": None}, "expected a model with its vocabulary, got None"),
    ({"model__dropout": 0.5}, "model.dropout=0.5 is not supported"),
    ({"model__vocab": {"a": 0, "b": 0}}, "distinct ids"),
    ({"model__vocab": {"a": 0, "b": 1}, "added_tokens": []}, "cannot read this tokenizer: Token `"),
    ({"model__vocab": ["a"]}, "distinct ids"),
    ({"model__merges": "ab"}, "expected a list of merges"),
    ({"model__merges": ["ab"]}, "expected a merge of two tokens, got 'ab'"),
    ({"model__merges": [["a", 1]]}, "expected a merge of two tokens"),
    ({"model__merges": ["ÿ ÿ"]}, "1 tokens that have no id"),
    ({"decoder": {"type": "WordPiece"}}, "decoder.type='WordPiece'"),
    ({"post_processor": {"type": "TemplateProcessing"}}, "a template around the text"),
    ({"added_tokens": [{"content": "<m>", "id": 390, "lstrip": 3}]}, "expected lstrip to be true or false, got 3"),
    ({"pre_tokenizer": {"type": "ByteLevel"}}, "expected add_prefix_space to be true or false, got None"),
    ({"added_tokens": [{"content": "\ud800", "id": 390}]}, "the lone surrogate '\\ud800'"),
    ({"added_tokens": [3]}, "expected an added token with its content, got 3"),
    ({"added_tokens": 3}, "expected added_tokens to be a list"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_unsupported_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    tokenizer = trained()
    tokenizer.post_processor = processors.ByteLevel()
    with pytest.raises(CheckpointError) as error:
        load_tokenizer(edited(tokenizer, tmp_path, **changes), 500)
    assert message in str(error.value) and "\n" not in str(error.value)


OTHERS: list[dict[str, Any]] = [
    {"normalizer": {"type": "NFC"}},
    {"model__byte_fallback": True},
    {"model__end_of_word_suffix": "</w>"},
    {"pre_tokenizer": {"type": "Whitespace"}},
    {"pre_tokenizer": None},
    {"added_tokens": [], "model__ignore_merges": True},
]


@pytest.mark.parametrize("changes", OTHERS, ids=str)
def test_what_tiktoken_cannot_do_equals_tokenizers(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = edited(trained(), tmp_path, **changes)
    mine, theirs = load_tokenizer(folder, 500), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in [*FRAGMENTS, "".join(FRAGMENTS), *CORPUS]:
        check_equal(mine, theirs, text)


@pytest.mark.parametrize("changes", OTHERS, ids=str)
def test_gpt2s_class_has_gpt2s_rules_only(tmp_path: Path, changes: dict[str, Any]) -> None:
    """transformers would do as if these rules were not there; that class, or they, cannot be meant."""
    folder = edited(trained(), tmp_path, **changes)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    if "added_tokens" in changes:  # an option of no rule: it counts for nothing in that class
        return
    with pytest.raises(CheckpointError, match=r"is not supported, only|expected pre_tokenizer to be"):
        load_tokenizer(folder, 500)


def test_vocabulary_beyond_the_embeddings(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has ids up to 389, but the model's vocabulary has 380"):
        load_tokenizer(save(trained(), tmp_path), 380)


def test_ignore_merges_of_a_trained_vocabulary(tmp_path: Path) -> None:
    theirs = trained()
    folder = edited(theirs, tmp_path, model__ignore_merges=True)
    check_equal(load_tokenizer(folder, 390), Tokenizer.from_file(str(folder / "tokenizer.json")), CORPUS[0])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", os.urandom(300), b"[" * 100_000])
@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.json"])
def test_damaged_files(tmp_path: Path, file: str, content: bytes) -> None:
    (tmp_path / file).write_bytes(content)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(CheckpointError) as error:
        load_tokenizer(tmp_path, 300)
    assert "\n" not in str(error.value)


def test_no_files_and_another_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="its vocabulary of 65 is not GPT-2's"):
        load_tokenizer(tmp_path, 65)


@pytest.mark.parametrize("flag", ["add_bos_token", "add_eos_token"])
def test_settings_that_add_tokens_count_without_tokenizer_json(tmp_path: Path, flag: str) -> None:
    """And are refused there; beside tokenizer.json, whose post_processor says it, transformers reads over them."""
    from transformers import AutoTokenizer

    folder = save(trained(), tmp_path / "json")
    (folder / "tokenizer_config.json").write_text(json.dumps({flag: True}))
    assert load_tokenizer(folder, 390).encode("the") == AutoTokenizer.from_pretrained(folder)("the")["input_ids"]
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("".join(f"{left} {right}\n" for left, right in model["merges"]))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=f"{flag}=True is not supported"):
        load_tokenizer(folder, 390)


# --- streams and extremes --------------------------------------------------------------------------------------------


def test_stream_never_splits_a_character(gpt2: tuple[ours.Tokenizer, Any]) -> None:
    mine = gpt2[0]
    stream = StreamDecoder(mine)
    pieces = [stream.push(id) for id in mine.encode("a👩‍👩‍👧中")]
    assert "".join(pieces) == "a👩‍👩‍👧中" and not any("\ufffd" in piece for piece in pieces)
    first_byte = mine.encode("👩")[0]
    assert (stream.push(first_byte), stream.flush(), stream.push(mine.encode("b")[0])) == ("", "\ufffd", "b")


@pytest.mark.parametrize("run", [" " * 60_000, "\n \t\u3000" * 15_000, " " * 1_200_000])
def test_long_white_space(gpt2: tuple[ours.Tokenizer, Any], run: str) -> None:
    """A million spaces before text overflow the stack of tiktoken's regex engine when they are given to it at once."""
    mine, theirs = gpt2
    for text in (run, run + "x", "a" + run + " x" + run + "\nb"):
        ids = mine.encode(text)
        assert mine.decode(ids) == text
        if len(run) < 100_000:
            assert ids == theirs(text)["input_ids"]


def test_lone_surrogate_becomes_a_replacement_character(gpt2: tuple[ours.Tokenizer, Any]) -> None:
    assert gpt2[0].decode(gpt2[0].encode("a\ud800b")) == "a\ufffdb"


def test_import_is_light() -> None:
    """Neither torch nor transformers nor the hub's client: and what encodes only where text is encoded."""
    import subprocess
    import sys

    heavy = (
        "torch",
        "transformers",
        "tiktoken",
        "tokenizers",
        "sentencepiece",
        "huggingface_hub",
        "ml_dtypes",
        "safetensors",
    )
    code = f"import sys, tokenizer; print([m for m in {heavy} if m in sys.modules])"
    root = Path(ours.__file__).parent
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

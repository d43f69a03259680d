"""The tokenizer of a GGUF file, from its metadata.

`tokenizer.ggml.model` says which of two kinds it is (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md):

- "gpt2": byte-level BPE, with `merges`. How a text is split before is only named, by `pre`: the names here are those of
  GPT-2's relatives, as llama.cpp understands them (llama-vocab.cpp). transformers reads over `pre` where it is
  "starcoder" or "smollm"; llama.cpp, and the tokenizer.json that was converted, split each digit off.
- "llama": SentencePiece's BPE, whose merges follow from the scores: of the pairs that make a token the one with the
  highest score is merged first. As with SentencePiece and llama.cpp a text gets a space before it even where it begins
  with one, in which transformers' LlamaTokenizer differs.

Tokens of the types "control" and "user defined" are found in a text. Whether a text begins with `bos_token_id` the file
says, or else the kind: SentencePiece's does, and Llama 3's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from tokenizing.added_tokens import AddedToken
from tokenizing.description import Description, parse_merges, parse_vocabulary, shown
from tokenizing.pipelines import SPACE, Pipeline, piece_decoder
from tokenizing.sources import GgufTokenizer
from weight_loader import CheckpointError

_KEY = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # token_type

_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais")
_DIGITS = ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b")
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_gguf(source: GgufTokenizer) -> Description | Pipeline:
    """What the metadata describes: a description if it is GPT-2's kind without a token before a text.

    Raises:
        CheckpointError: keys are absent or damaged, or of a tokenizer that is not known here.
    """
    return _Metadata(source).read()


class _Metadata:
    def __init__(self, source: GgufTokenizer) -> None:
        self._source = source.source
        self._values = source.metadata
        self._tokens: list[str] = self._list("tokens", str)
        has_types = f"{_KEY}token_type" in self._values
        self._types: list[int] = self._list("token_type", int) if has_types else [_NORMAL] * len(self._tokens)
        if len(self._types) != len(self._tokens):
            raise CheckpointError(
                f"{self._source}: expected a token_type for each of {len(self._tokens)} tokens, got {len(self._types)}"
            )

    def read(self) -> Description | Pipeline:
        kind = self._values.get(f"{_KEY}model")
        if kind == "gpt2":
            return self._byte_level()
        if kind == "llama":
            return self._sentencepiece()
        raise CheckpointError(f"{self._source}: {_KEY}model={shown(kind)} is not supported, only 'gpt2' and 'llama'")

    # ---- the kinds ---------------------------------------------------------------------------------------------------

    def _byte_level(self) -> Description | Pipeline:
        pre = self._values.get(f"{_KEY}pre", "gpt-2")  # older files have none; GPT-2's is what transformers takes then
        if pre not in (*_GPT2, *_DIGITS, *_LLAMA3):
            known = ", ".join((*_GPT2, *_DIGITS, *_LLAMA3))
            raise CheckpointError(f"{self._source}: {_KEY}pre={shown(pre)} is not supported, only {known}")
        vocabulary = self._vocabulary()
        merges = parse_merges(self._source, self._list("merges", str))
        around = self._around(has_begin=pre in _LLAMA3)
        added = self._added()
        if pre in _GPT2 and around is None:
            return Description(self._source, vocabulary, merges, added, eos_token=self._token("eos"))
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        steps: list[dict[str, Any]] = [byte_level]
        if pre in _DIGITS:
            steps.insert(0, {"type": "Digits", "individual_digits": True})
        if pre in _LLAMA3:
            pattern = {"Regex": _LLAMA3_PATTERN}
            split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
            steps = [split, {**byte_level, "use_regex": False}]
        content = {
            "version": "1.0",
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
            "post_processor": around,
            "decoder": byte_level,
            "model": _bpe(vocabulary, merges, ignore_merges=pre in _LLAMA3),
        }
        return Pipeline(self._source, content, added, self._token("eos"))

    def _sentencepiece(self) -> Pipeline:
        vocabulary = self._vocabulary()
        scores: list[float] = self._list("scores", float)
        if len(scores) != len(self._tokens) or any(map(math.isnan, scores)):
            raise CheckpointError(
                f"{self._source}: expected a score for each of {len(self._tokens)} tokens, got {len(scores)}"
            )
        if self._flag("remove_extra_whitespaces", False) or self._values.get(f"{_KEY}precompiled_charsmap") is not None:
            raise CheckpointError(f"{self._source}: a SentencePiece vocabulary with a normalization is not supported")
        if odd := [token.content for token in self._added() if SPACE in token.content or " " in token.content]:
            raise CheckpointError(
                f"{self._source}: a SentencePiece vocabulary with {odd[0]!r:.60}, a token of its own that has a space, "
                "is not supported"
            )
        has_space = self._flag("add_space_prefix", True)
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        content = {
            "version": "1.0",
            "normalizer": {
                "type": "Sequence",
                "normalizers": [{"type": "Prepend", "prepend": SPACE}, spaces] if has_space else [spaces],
            },
            "pre_tokenizer": None,
            "post_processor": self._around(has_begin=True),
            "decoder": piece_decoder(has_space),
            "model": {
                **_bpe(vocabulary, self._implied_merges(scores)),
                **{"unk_token": self._token("unknown"), "fuse_unk": True, "byte_fallback": _BYTE in self._types},
            },
        }
        return Pipeline(self._source, content, self._added(), self._token("eos"))

    def _implied_merges(self, scores: list[float]) -> list[tuple[str, str]]:
        """The pairs that SentencePiece merges, in its order: those of normal tokens that make another."""
        words = {
            token: score
            for token, score, kind in zip(self._tokens, scores, self._types, strict=True)
            if kind in (_NORMAL, _USER_DEFINED, _UNUSED)
        }
        found = [
            (-score, word[:cut], word[cut:])
            for word, score in words.items()
            for cut in range(1, len(word))
            if word[:cut] in words and word[cut:] in words
        ]
        return [(left, right) for _, left, right in sorted(found, key=lambda item: item[0])]

    # ---- the values --------------------------------------------------------------------------------------------------

    def _vocabulary(self) -> dict[str, int]:
        vocabulary = {token: id for id, token in enumerate(self._tokens)}
        if len(vocabulary) < len(self._tokens):
            raise CheckpointError(f"{self._source}: expected each token once in {_KEY}tokens")
        return parse_vocabulary(self._source, vocabulary)

    def _added(self) -> list[AddedToken]:
        """The tokens that are found in a text as they are."""
        return [
            AddedToken(token, special=kind == _CONTROL, id=id)
            for id, (token, kind) in enumerate(zip(self._tokens, self._types, strict=True))
            if kind in (_CONTROL, _USER_DEFINED) and token
        ]

    def _around(self, has_begin: bool) -> dict[str, Any] | None:
        """The post-processor that puts tokens around a text, if there are such.

        Args:
            has_begin: whether a text of this kind begins with one where the file does not say.
        """
        wanted = {"bos": self._flag("add_bos_token", has_begin), "eos": self._flag("add_eos_token", False)}
        names = {key: self._token(key) for key, is_wanted in wanted.items() if is_wanted}
        names = {key: name for key, name in names.items() if name is not None}
        if not names:
            return None
        pieces: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
        if name := names.get("bos"):
            pieces.insert(0, {"SpecialToken": {"id": name, "type_id": 0}})
        if name := names.get("eos"):
            pieces.append({"SpecialToken": {"id": name, "type_id": 0}})
        return {
            "type": "TemplateProcessing",
            "single": pieces,
            "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                name: {"id": name, "ids": [self._id(key)], "tokens": [name]} for key, name in names.items()
            },
        }

    def _token(self, name: str) -> str | None:
        """The token of that name, such as "eos"; None: there is none."""
        id = self._id(name)
        if id is None:
            return None
        if isinstance(id, bool) or not isinstance(id, int) or not 0 <= id < len(self._tokens):
            raise CheckpointError(
                f"{self._source}: expected {_KEY}{name}_token_id to be one of {len(self._tokens)} tokens, "
                f"got {shown(id)}"
            )
        return self._tokens[id]

    def _id(self, name: str) -> Any:
        id = self._values.get(f"{_KEY}{name}_token_id")
        if id is not None or self._values.get(f"{_KEY}model") != "llama":
            return id
        # SentencePiece's own, which older files do not name.
        usual, kind = {"unknown": (0, _UNKNOWN), "bos": (1, _CONTROL), "eos": (2, _CONTROL)}[name]
        return usual if self._types[usual : usual + 1] == [kind] else None

    def _flag(self, name: str, default: bool) -> bool:
        value = self._values.get(f"{_KEY}{name}", default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self._source}: expected {_KEY}{name} to be true or false, got {shown(value)}")
        return value

    def _list(self, name: str, kind: type) -> list[Any]:
        value: Any = self._values.get(f"{_KEY}{name}")
        value = value.tolist() if hasattr(value, "tolist") else value  # an array
        if not isinstance(value, (list, tuple)):
            raise CheckpointError(f"{self._source}: expected {_KEY}{name} to be a list, got {shown(value)}")
        if odd := [item for item in value if type(item) is not kind]:
            raise CheckpointError(
                f"{self._source}: expected {_KEY}{name} to be of type {kind.__name__}, got {shown(odd[0])}"
            )
        return list(value)


def _bpe(vocabulary: dict[str, int], merges: Iterable[tuple[str, str]], ignore_merges: bool = False) -> dict[str, Any]:
    return {
        **{"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False},
        **{"continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": ignore_merges},
        **{"vocab": vocabulary, "merges": [list(pair) for pair in merges]},
    }

"""HuggingFace's tokenizer files → what they describe, as transformers' AutoTokenizer understands a folder.

transformers knows three classes that concern us. GPT2Tokenizer takes from tokenizer.json only the vocabulary and the
merges (from vocab.json and merges.txt where there is none) and builds the rest anew, from tokenizer_config.json; so
does LlamaTokenizer, in SentencePiece's manner. TokenizersBackend, of which PreTrainedTokenizerFast is another name,
takes all of tokenizer.json. Any other class has rules, or ids, of its own, and is refused by name.

In one thing transformers 5 is not followed. Its GPT2Tokenizer, of which the files of StarCoder2, SmolLM2 and their kind
speak, forgets how tokenizer.json splits a text: each digit by itself, first of all. transformers 4 did not, and
neither did those who trained these models: such a file is taken as TokenizersBackend takes it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizing.added_tokens import AddedToken, Addition
from tokenizing.description import (
    END_OF_TEXT,
    Description,
    NotModelled,
    boolean,
    distinct,
    listed_tokens,
    parse_merges,
    parse_rules,
    parse_token,
    parse_vocabulary,
    raw_tokens,
    shown,
)
from tokenizing.pipelines import SPACE, Pipeline, piece_decoder
from tokenizing.sources import BytePairFiles
from weight_loader import CheckpointError, read_json

# The names of the classes, each with the ending "Fast" or without it.
_GPT2_CLASS = "GPT2Tokenizer"
_LLAMA_CLASS = "LlamaTokenizer"
_BACKEND_CLASS = "TokenizersBackend"
_BACKEND_CLASSES = ("PreTrainedTokenizer", _BACKEND_CLASS, "BloomTokenizer")
# The class of a model_type, by whose name tokenizer_config.json need not give one. TokenizersBackend is the class of
# such a model whatever the files say.
_CLASS_OF_MODEL = {
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj", "starcoder2"), _GPT2_CLASS),
    **dict.fromkeys(("gpt_bigcode", "granite", "mistral", "nemotron", "stablelm"), _BACKEND_CLASS),
}
_MODELS = (*_CLASS_OF_MODEL, "llama")
# What each class takes for granted where the files do not say otherwise.
_DEFAULTS: dict[str, dict[str, str]] = {
    _GPT2_CLASS: dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
    _LLAMA_CLASS: {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    _BACKEND_CLASS: {},
}

# The keys under which tokenizer_config.json and special_tokens_map.json name special tokens, in transformers' order.
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Settings of tokenizer_config.json that change the ids, or which file they come from.
_REFUSED = ("split_special_tokens", "fast_tokenizer_files", "auto_map", "init_inputs")
# Others, that transformers heeds only where there is no tokenizer.json.
_REFUSED_WITHOUT_JSON = ("add_bos_token", "add_eos_token")


def has_files(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return (folder / "tokenizer.json").is_file() or all((folder / n).is_file() for n in ("vocab.json", "merges.txt"))


def read(folder: Path) -> Description:
    """What the files of a folder describe, if it is GPT-2's kind of tokenizer or an alphabet; see `has_files`.

    Raises:
        NotModelled: it is another kind of tokenizer.
        CheckpointError: the files are damaged, or contradict each other.
    """
    return Files(folder).description()


def read_byte_pairs(source: BytePairFiles) -> Description:
    """What vocab.json and merges.txt describe that are alone, as GPT2Tokenizer reads them.

    Raises:
        CheckpointError: they are damaged.
    """
    path = source.source
    try:
        vocabulary = json.loads(source.vocabulary)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its vocabulary is not valid JSON: {error}") from error
    description = Description(path, parse_vocabulary(path, vocabulary), _read_merges(path, source.merges))
    addition = Addition(description.vocabulary)
    addition.add(AddedToken(END_OF_TEXT, special=True))
    return replace(description, added=distinct(description, addition), eos_token=END_OF_TEXT)


@dataclass(frozen=True)
class BesideModel:
    """What the files beside a SentencePiece model say.

    Attributes:
        added: tokens that are found in a text before the model sees the rest, by id.
        before, behind: the tokens that are put before every text, and behind it.
        eos_token: which one ends a text.
    """

    added: list[AddedToken]
    before: list[str | None]
    behind: list[str | None]
    eos_token: str | None


class Files:
    """The tokenizer's files of a folder; see `has_files`.

    Raises:
        CheckpointError: they are damaged, or of a class that is not known here.
    """

    def __init__(self, folder: Path, has_model: bool = False) -> None:
        """Read them.

        Args:
            folder: where they are.
            has_model: whether a SentencePiece model is there in the place of these files.
        """
        self._folder = folder
        self._settings = _read_if_there(folder / "tokenizer_config.json")
        self._source = folder / "tokenizer_config.json"
        beside = folder / "special_tokens_map.json"  # which may hold any setting, but is not read beside newer settings
        self._more = {} if "added_tokens_decoder" in self._settings else _read_if_there(beside)
        is_json = (folder / "tokenizer.json").is_file()
        self._raw = read_json(folder / "tokenizer.json") if is_json else None
        for path, values in ((self._source, self._settings), (beside, self._more)):
            for key in _REFUSED if is_json or has_model else (*_REFUSED, *_REFUSED_WITHOUT_JSON):
                if values.get(key):
                    raise CheckpointError(f"{path}: {key}={shown(values[key])} is not supported")
        if is_json:
            self._settings = {key: self._settings[key] for key in self._settings if key not in _REFUSED_WITHOUT_JSON}
        self._class = _find_class(folder, self._settings)
        if has_model:
            self._class = _LLAMA_CLASS
        elif self._raw is None:
            if self._class == _LLAMA_CLASS:
                raise CheckpointError(f"{folder}: expected tokenizer.json for {_LLAMA_CLASS}, got only vocab.json")
            self._class = _GPT2_CLASS
        self._defaults = _DEFAULTS[self._class]
        if self._class == _GPT2_CLASS and _splits_in_steps(self._raw):
            self._class = _BACKEND_CLASS

    def description(self) -> Description:
        """What they describe, if it is GPT-2's kind of tokenizer or an alphabet.

        Raises:
            NotModelled: it is another kind of tokenizer.
            CheckpointError: the files are damaged, or contradict each other.
        """
        is_gpt2 = self._class == _GPT2_CLASS
        if self._class == _LLAMA_CLASS:
            raise NotModelled(f"{self._source}: {_LLAMA_CLASS} is neither GPT-2's kind of tokenizer nor an alphabet")
        if self._raw is None:
            description = _read_vocab_and_merges(self._folder)
        elif is_gpt2:
            description = self._json_of_gpt2(self._raw)
        else:
            description = parse_rules(self._folder / "tokenizer.json", self._raw, has_rules=True)
        if is_gpt2:
            add_prefix_space = boolean(self._source, self._settings | self._more, "add_prefix_space", False)
            description = replace(description, use_regex=True, add_prefix_space=add_prefix_space, ignore_merges=False)
        addition, eos = self._added(description.vocabulary, has_listed=not is_gpt2)
        return replace(description, added=distinct(description, addition), eos_token=eos)

    def pipeline(self) -> Pipeline:
        """What they describe, if it is none of what `description` describes.

        Raises:
            CheckpointError: the files are damaged, or contradict each other.
        """
        raw, source = self._raw or {}, self._folder / "tokenizer.json"
        model = raw.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if not isinstance(model, dict) or not isinstance(vocabulary, (dict, list)):
            raise CheckpointError(f"{source}: expected a model with its vocabulary, got {shown(model)}")
        if self._class == _LLAMA_CLASS:
            raw = self._llama(source, raw, model)
        words = parse_vocabulary(source, vocabulary) if isinstance(vocabulary, dict) else _unigrams(source, vocabulary)
        addition, eos = self._added(words, has_listed=self._class == _BACKEND_CLASS)
        return Pipeline(source, raw, addition.history, eos)

    def beside_model(self, vocabulary: dict[str, int], control: list[str]) -> BesideModel:
        """What they say beside a SentencePiece model.

        Args:
            vocabulary: id by piece.
            control: the pieces that a text cannot have by itself.

        Raises:
            CheckpointError: the files are damaged, or contradict each other.
        """
        settings = self._defaults | self._settings | self._more
        addition, eos = self._added(vocabulary, has_listed=False)
        for piece in control:
            addition.add(AddedToken(piece, special=True))
        before, behind = (
            [_content(settings.get(key))] if boolean(self._source, settings, f"add_{key}", False) else []
            for key in ("bos_token", "eos_token")
        )
        return BesideModel(addition.tokens(), before, behind, eos)

    def _json_of_gpt2(self, raw: dict[str, Any]) -> Description:
        source = self._folder / "tokenizer.json"
        try:
            description = parse_rules(source, raw, has_rules=False)
        except NotModelled as error:
            # GPT2Tokenizer would do as if these rules were GPT-2's, which those who wrote them did not mean.
            raise CheckpointError(str(error)) from None
        if description.merges is None:
            raise CheckpointError(
                f"{source} holds an alphabet, which {_GPT2_CLASS}, the tokenizer_class of this checkpoint, "
                f"cannot read: expected tokenizer_class PreTrainedTokenizerFast in {self._source.name}"
            )
        return description

    def _llama(self, source: Path, raw: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
        """The tokenizer.json of what LlamaTokenizer builds of the vocabulary and the merges of one."""
        if model.get("type", "BPE") != "BPE":
            raise CheckpointError(f"{source}: model.type={shown(model['type'])} is not supported, only 'BPE'")
        settings = self._settings | self._more
        prefix = settings.get("add_prefix_space")
        has_prefix = True if prefix is None else boolean(self._source, settings, "add_prefix_space", None)
        is_legacy = bool(settings.get("legacy"))
        scheme = "never" if not has_prefix else "always" if is_legacy else "first"
        return {
            "version": "1.0",
            "normalizer": None,
            "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False},
            "post_processor": raw.get("post_processor"),
            "decoder": piece_decoder(has_prefix),
            "model": {
                **{"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": True, "byte_fallback": True},
                **{"continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": False},
                **{"vocab": model.get("vocab"), "merges": model.get("merges")},
            },
        }

    def _added(self, vocabulary: dict[str, int], has_listed: bool) -> tuple[Addition, str | None]:
        """The tokens that are added to the vocabulary, and which token ends a text.

        Args:
            has_listed: whether those that tokenizer.json lists come first.
        """
        addition = Addition(vocabulary)
        if self._raw is not None and has_listed:
            for token in listed_tokens(self._folder / "tokenizer.json", self._raw):
                addition.add(token)
        return addition, _add_special_tokens(self._folder, addition, self._defaults | self._settings, self._raw)


# ---- which class -----------------------------------------------------------------------------------------------------


def _find_class(folder: Path, settings: dict[str, Any]) -> str:
    """Which class transformers reads the folder with."""
    config = _read_if_there(folder / "config.json")
    model_type = config.get("model_type")
    if model_type is not None and model_type not in _MODELS:
        raise CheckpointError(
            f"{folder / 'config.json'}: expected model_type 'gpt2', or that of a relative, for its tokenizer, "
            f"got {shown(model_type)}"
        )
    usual = _CLASS_OF_MODEL.get(str(model_type), _BACKEND_CLASS)
    for source, given in (
        ("tokenizer_config.json", settings.get("tokenizer_class")),
        ("config.json", config.get("tokenizer_class")),
    ):
        if given is None:
            continue
        name = given.removesuffix("Fast") if isinstance(given, str) else given
        if name not in (_GPT2_CLASS, _LLAMA_CLASS, *_BACKEND_CLASSES):
            raise CheckpointError(
                f"{folder / source}: tokenizer_class={shown(given)} is not supported, "
                f"only {_GPT2_CLASS}, {_LLAMA_CLASS} and PreTrainedTokenizerFast"
            )
        if name in _BACKEND_CLASSES or (model_type in _CLASS_OF_MODEL and usual == _BACKEND_CLASS):
            return _BACKEND_CLASS
        return _BACKEND_CLASS if name == _LLAMA_CLASS and _is_byte_level(folder / "tokenizer.json") else name
    return usual


def _is_byte_level(file: Path) -> bool:
    """Whether the word stands anywhere in a tokenizer.json, which is what transformers asks."""
    try:
        return b'"ByteLevel"' in file.read_bytes()
    except OSError:
        return False


def _splits_in_steps(raw: dict[str, Any] | None) -> bool:
    """Whether a byte-level tokenizer.json does something to the words before GPT-2's pattern, or in its place."""
    match raw:
        case {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [_, *_, {"type": "ByteLevel"}]}}:
            return True
    return False


def _unigrams(source: Path, vocabulary: list[Any]) -> dict[str, int]:
    """The vocabulary of a Unigram model, which is a list of tokens with their scores."""
    words = [item[0] if isinstance(item, list) and item else item for item in vocabulary]
    if not all(isinstance(word, str) for word in words):
        raise CheckpointError(f"{source}: expected the vocabulary to be a list of tokens with their scores")
    return {word: id for id, word in enumerate(words)}


# ---- the files beside tokenizer.json -------------------------------------------------------------------------------


def _read_vocab_and_merges(folder: Path) -> Description:
    """vocab.json and merges.txt, of GPT-2's original tokenizer."""
    merges, vocab = folder / "merges.txt", folder / "vocab.json"
    try:
        lines = merges.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {merges}: {error.strerror}") from error
    return Description(vocab, parse_vocabulary(vocab, read_json(vocab)), _read_merges(merges, lines))


def _read_merges(source: Path, content: bytes) -> list[tuple[str, str]]:
    try:
        lines = content.decode("utf-8").split("\n")
    except ValueError as error:
        raise CheckpointError(f"cannot read {source} as UTF-8 text: {type(error).__name__}") from error
    lines = [line.removesuffix("\r") for line in lines if not line.startswith("#version")]
    return parse_merges(source, [line for line in lines if line])


def _add_special_tokens(
    folder: Path, addition: Addition, settings: dict[str, Any], raw: dict[str, Any] | None
) -> str | None:
    """Add, in transformers' order, what the files beside the vocabulary name.

    Args:
        settings: tokenizer_config.json, with the class's own defaults.
        raw: tokenizer.json, if there is one.

    Returns:
        Which token ends a text.
    """
    source = folder / "tokenizer_config.json"
    settings = dict(settings)
    _rename_additional(settings)
    _check_extra(source, settings)
    own = {key: settings.pop(key) for key in list(settings) if _names_own_token(key, settings[key])}
    own |= _popped_dict(settings, "extra_special_tokens")
    if own:
        settings["model_specific_special_tokens"] = own

    by_id: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in settings:
        decoder = settings["added_tokens_decoder"]
        if not isinstance(decoder, dict):
            raise CheckpointError(f"{source}: expected added_tokens_decoder by id, got {shown(decoder)}")
        for id, token in decoder.items():
            if not id.isdecimal() or not id.isascii() or len(id) > 10:
                raise CheckpointError(f"{source}: expected added_tokens_decoder by id, got {shown(id)}")
            by_id[int(id)] = parse_token(source, token)
    else:
        _read_special_tokens_map(folder / "special_tokens_map.json", settings)
        _check_extra(folder / "special_tokens_map.json", settings)
        more = _values(settings.get("extra_special_tokens"))
        named = {_content(settings.get(key)) for key in _SPECIAL} | {_content(token) for token in more}
        for content, id in _read_if_there(folder / "added_tokens.json").items():
            if type(id) is not int:
                raise CheckpointError(f"{folder / 'added_tokens.json'}: expected ids by token, got {shown(id)}")
            by_id[id] = AddedToken(content, normalized=content not in named, special=content in named)
        for token in raw_tokens(folder / "tokenizer.json", raw) if raw is not None else []:
            by_id[_json_id(folder, token)] = parse_token(folder / "tokenizer.json", token)

    by_content = {token.content: token for _, token in by_id.items()}
    special: list[str | AddedToken] = []
    for key in _SPECIAL:
        if (value := settings.get(key)) is not None:
            token = _named(source, key, value)
            special.append(by_content.get(_content(token) or "", token))
    own_names = settings.get("model_specific_special_tokens")
    automatic = {key: value for key, value in settings.items() if _names_own_token(key, value)}
    for key, value in (automatic | (own_names if isinstance(own_names, dict) else {})).items():
        special.append(_named(source, key, value))
    names = {_content(token) for token in special}

    tokens: list[str | AddedToken] = [token for _, token in sorted(by_id.items())]
    known = {_content(token) for token in tokens}
    _rename_additional(settings, always=True)
    more = [_named(source, "extra_special_tokens", token) for token in _values(settings.get("extra_special_tokens"))]
    for token in (*special, *more):
        content = _content(token) or ""  # an empty one is not added
        if content not in known and content not in addition and token not in tokens:
            tokens.append(token)
    for token in tokens:
        if isinstance(token, str):
            token = AddedToken(token, special=True)
        elif token.content in names:
            token = replace(token, special=True)
        addition.add(token)
    eos = settings.get("eos_token")
    return _content(eos) if eos is not None else END_OF_TEXT if END_OF_TEXT in addition else None


def _rename_additional(settings: dict[str, Any], always: bool = False) -> None:
    """What older files call additional_special_tokens are extra_special_tokens, unless there are such."""
    is_free = "extra_special_tokens" not in settings if always else not settings.get("extra_special_tokens")
    if "additional_special_tokens" in settings and is_free:
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens")


def _check_extra(source: Path, settings: dict[str, Any]) -> None:
    """Refuse extra tokens that are neither listed nor named, as transformers does."""
    value = settings.get("extra_special_tokens")
    if value is not None and not isinstance(value, (list, dict)):
        raise CheckpointError(f"{source}: expected extra_special_tokens to be a list or named, got {shown(value)}")


def _names_own_token(key: str, value: object) -> bool:
    """Whether a setting names a special token of this tokenizer alone, such as "image_token"."""
    is_token = isinstance(value, str) or (isinstance(value, dict) and value.get("__type") == "AddedToken")
    return key.endswith("_token") and key not in _SPECIAL and is_token


def _popped_dict(settings: dict[str, Any], key: str) -> dict[str, Any]:
    value = settings.get(key)
    return settings.pop(key) if isinstance(value, dict) else {}


def _read_special_tokens_map(path: Path, settings: dict[str, Any]) -> None:
    """special_tokens_map.json, which wins over tokenizer_config.json."""
    for key, value in _read_if_there(path).items():
        if isinstance(value, dict) and key != "extra_special_tokens":
            value = {**value, "special": True, "__type": "AddedToken"}
        elif key == "extra_special_tokens" and isinstance(value, list):
            tokens = [
                {**token, "special": True, "__type": "AddedToken"} if isinstance(token, dict) else token
                for token in value
            ]
            value = list(_values(settings.get(key)))
            value += [token for token in tokens if token not in value]
        settings[key] = value
    if own := _popped_dict(settings, "extra_special_tokens"):
        settings["model_specific_special_tokens"] = settings.get("model_specific_special_tokens", {}) | own


def _json_id(folder: Path, token: object) -> int:
    id = token.get("id") if isinstance(token, dict) else None
    if type(id) is not int:
        raise CheckpointError(f"{folder / 'tokenizer.json'}: expected an added token with its id, got {shown(token)}")
    return id


def _named(source: Path, key: str, value: object) -> str | AddedToken:
    """A special token that is written as a string, or as an object with flags."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: expected {key} to be a token, got {shown(value)}")
    return parse_token(source, value)


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _values(tokens: object) -> list[Any]:
    return tokens if isinstance(tokens, list) else []


def _content(token: object) -> str | None:
    """The text of a token that is written as a string or as an object with flags."""
    content = token.content if isinstance(token, AddedToken) else token
    content = content.get("content") if isinstance(content, dict) else content
    return content if isinstance(content, str) else None

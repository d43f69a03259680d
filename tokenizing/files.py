"""HuggingFace's tokenizer files → what they describe; and back, as one tokenizer.json.

    description = read(Path("checkpoint"))     # as transformers' AutoTokenizer understands the folder
    description.vocab_size                     # the largest id + 1: there may be holes
    to_json(description)                       # a tokenizer.json that says all of it, for training to write

transformers knows two classes that concern us. GPT2Tokenizer takes from tokenizer.json only the vocabulary and the
merges (from vocab.json and merges.txt where there is none) and builds the rest anew, from tokenizer_config.json.
TokenizersBackend, of which PreTrainedTokenizerFast is another name, takes all of tokenizer.json. Any other class has
rules, or ids, of its own, and is refused by name, and so is whatever else tokenizer.py could not do exactly.

Truncation and padding, which tokenizer.json may ask for, are not part of a tokenizer here: no text is cut in silence.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenizing.added_tokens import AddedToken, Addition
from weight_loader import CheckpointError, read_json

END_OF_TEXT = "<|endoftext|>"

#: The pre-tokenizer of an alphabet, as `tokenizers` writes it.
EACH_CHARACTER = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}

# The names of the two classes, each with the ending "Fast" or without it.
_GPT2_CLASS = "GPT2Tokenizer"
_BACKEND_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend", "BloomTokenizer")
# The class of a model_type, by whose name tokenizer_config.json need not give one.
_CLASS_OF_MODEL = {"gpt2": _GPT2_CLASS, "gpt_neo": _GPT2_CLASS, "gptj": _GPT2_CLASS}

# The keys under which tokenizer_config.json and special_tokens_map.json name special tokens, in transformers' order.
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Settings of tokenizer_config.json that change the ids, or which file they come from.
_REFUSED = ("add_bos_token", "add_eos_token", "split_special_tokens", "fast_tokenizer_files", "auto_map", "init_inputs")


@dataclass(frozen=True)
class Description:
    """A tokenizer as its files describe it: byte-level BPE, or an alphabet, where each character is a token.

    Attributes:
        source: the file with the vocabulary, for messages.
        vocabulary: id by token: in the byte alphabet, of an alphabet its characters.
        merges: by priority; None: an alphabet.
        added: tokens that are found in the text before it is split into words, by id.
        use_regex: whether a text is split into words by GPT-2's pattern, or taken as one word.
        add_prefix_space: whether every text, and what follows an added token, begins with a space.
        ignore_merges: whether a word that is a token is taken as it is.
        eos_token: which one ends a text, if the files say so.
    """

    source: Path = field(compare=False)
    vocabulary: dict[str, int]
    merges: list[tuple[str, str]] | None
    added: list[AddedToken] = field(default_factory=list)
    use_regex: bool = True
    add_prefix_space: bool = False
    ignore_merges: bool = False
    eos_token: str | None = field(default=None, compare=False)

    @property
    def vocab_size(self) -> int:
        """So many embeddings hold all ids: the largest one plus 1."""
        return max([*self.vocabulary.values(), *(token.id for token in self.added)], default=-1) + 1

    def within(self, vocab_size: int) -> Description:
        """Without the added tokens that a model of `vocab_size` embeddings has none for.

        Raises:
            CheckpointError: the vocabulary itself is larger.
        """
        largest = max(self.vocabulary.values(), default=0)
        if largest >= vocab_size:
            raise CheckpointError(f"{self.source} has ids up to {largest}, but the model's vocabulary has {vocab_size}")
        return replace(self, added=[token for token in self.added if token.id < vocab_size])


def has_files(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return (folder / "tokenizer.json").is_file() or all((folder / n).is_file() for n in ("vocab.json", "merges.txt"))


def read(folder: Path) -> Description:
    """What the files of a folder describe; see `has_files`.

    Raises:
        CheckpointError: they are damaged, or of a tokenizer that is neither byte-level BPE nor an alphabet.
    """
    settings = _read_if_there(folder / "tokenizer_config.json")
    source = folder / "tokenizer_config.json"
    beside = folder / "special_tokens_map.json"  # which may hold any setting, but is not read beside the newer format
    more = {} if "added_tokens_decoder" in settings else _read_if_there(beside)
    for path, values in ((source, settings), (beside, more)):
        for key in _REFUSED:
            if values.get(key):
                raise CheckpointError(f"{path}: {key}={_shown(values[key])} is not supported")
    is_gpt2 = _is_gpt2_class(folder, settings)
    if (folder / "tokenizer.json").is_file():
        raw = read_json(folder / "tokenizer.json")
        description = _from_json(folder / "tokenizer.json", raw, has_rules=not is_gpt2)
        if is_gpt2 and description.merges is None:
            raise CheckpointError(
                f"{folder / 'tokenizer.json'} holds an alphabet, which {_GPT2_CLASS}, the tokenizer_class of this "
                f"checkpoint, cannot read: expected tokenizer_class PreTrainedTokenizerFast in {source.name}"
            )
    else:
        raw = None
        description = _read_vocab_and_merges(folder)
        is_gpt2 = True
    if is_gpt2:
        add_prefix_space = _flag(source, settings | more, "add_prefix_space", False)
        description = replace(description, use_regex=True, add_prefix_space=add_prefix_space, ignore_merges=False)
        settings = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT) | settings
    addition = Addition(description.vocabulary)
    if raw is not None and not is_gpt2:
        for token in _listed_in_json(description.source, raw):
            addition.add(token)
    eos = _add_special_tokens(folder, addition, settings, raw)
    return replace(description, added=_checked(description, addition), eos_token=eos)


def from_json(source: Path, raw: dict[str, Any]) -> Description:
    """What a tokenizer.json describes that is alone, as `tokenizers` reads it.

    Args:
        source: its name, for messages.
        raw: its content.
    """
    description = _from_json(source, raw, has_rules=True)
    addition = Addition(description.vocabulary)
    for token in _listed_in_json(source, raw):
        addition.add(token)
    eos = END_OF_TEXT if END_OF_TEXT in addition else None
    return replace(description, added=_checked(description, addition), eos_token=eos)


def to_json(description: Description) -> dict[str, Any]:
    """The content of the tokenizer.json that says all of it, as `tokenizers` writes it."""

    def byte_level(add_prefix_space: bool, trim_offsets: bool, use_regex: bool = True) -> dict[str, Any]:
        flags = {"add_prefix_space": add_prefix_space, "trim_offsets": trim_offsets, "use_regex": use_regex}
        return {"type": "ByteLevel", **flags}

    vocabulary = dict(sorted(description.vocabulary.items(), key=lambda item: item[1]))
    model: dict[str, Any] = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    if description.merges is not None:
        nothing = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
        model = {
            **{"type": "BPE", **dict.fromkeys(nothing), "fuse_unk": False, "byte_fallback": False},
            **{"ignore_merges": description.ignore_merges, "vocab": vocabulary},
            "merges": [list(pair) for pair in description.merges],
        }
    is_alphabet = description.merges is None
    return {
        **{"version": "1.0", "truncation": None, "padding": None},
        "added_tokens": [
            {"id": token.id, "content": token.content, **{flag: getattr(token, flag) for flag in _FLAGS}}
            for token in description.added
        ],
        "normalizer": None,
        "pre_tokenizer": EACH_CHARACTER
        if is_alphabet
        else byte_level(description.add_prefix_space, True, description.use_regex),
        "post_processor": None if is_alphabet else byte_level(True, False),
        "decoder": {"type": "Fuse"} if is_alphabet else byte_level(True, True),
        "model": model,
    }


# ---- which class -----------------------------------------------------------------------------------------------------


def _is_gpt2_class(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether transformers reads the folder with GPT2Tokenizer, or with TokenizersBackend."""
    config = _read_if_there(folder / "config.json")
    model_type = config.get("model_type")
    if model_type is not None and not (isinstance(model_type, str) and model_type in _CLASS_OF_MODEL):
        raise CheckpointError(
            f"{folder / 'config.json'}: expected model_type 'gpt2' for its tokenizer, got {_shown(model_type)}"
        )
    for source, given in (
        ("tokenizer_config.json", settings.get("tokenizer_class")),
        ("config.json", config.get("tokenizer_class")),
    ):
        if given is None:
            continue
        name = given.removesuffix("Fast") if isinstance(given, str) else given
        if name != _GPT2_CLASS and name not in _BACKEND_CLASSES:
            raise CheckpointError(
                f"{folder / source}: tokenizer_class={_shown(given)} is not supported, "
                f"only {_GPT2_CLASS} and PreTrainedTokenizerFast"
            )
        return name == _GPT2_CLASS
    return model_type is not None


# ---- vocabulary and merges -------------------------------------------------------------------------------------------


def _from_json(source: Path, raw: dict[str, Any], has_rules: bool) -> Description:
    """What a tokenizer.json says, but for its added tokens.

    Args:
        has_rules: whether it also says how a text is split; if not, the values in the description are not of use.
    """

    def part(name: str) -> dict[str, Any]:
        value = raw.get(name)
        if not isinstance(value, dict):
            raise CheckpointError(f"{source}: expected {name} to be of a byte-level BPE tokenizer, got {_shown(value)}")
        return value

    def require(name: str, found: object, *accepted: object) -> None:
        if not any(found is value or (type(found) is type(value) and found == value) for value in accepted):
            raise CheckpointError(f"{source}: {name}={_shown(found)} is not supported, only {accepted[0]!r}")

    model, pre_tokenizer = part("model"), part("pre_tokenizer")
    is_alphabet = model.get("type") == "WordLevel"
    if is_alphabet:
        # Each character a token, which the pattern cuts out, and the decoder joins without spaces between.
        require("pre_tokenizer", pre_tokenizer, EACH_CHARACTER)
        require("decoder.type", part("decoder").get("type"), "Fuse")
        unknown = model.get("unk_token")
        if not isinstance(unknown, str) or unknown in _vocabulary(source, model.get("vocab")):
            raise CheckpointError(f"{source}: an alphabet with a token for what is not in it is not supported")
    else:
        require("model.type", model.get("type", "BPE"), "BPE")
        require("pre_tokenizer.type", pre_tokenizer.get("type"), "ByteLevel")
        require("decoder.type", part("decoder").get("type"), "ByteLevel")
    normalizer = raw.get("normalizer")
    require("normalizer", normalizer.get("type") if isinstance(normalizer, dict) else normalizer, None)
    if not _adds_nothing(raw.get("post_processor")):
        raise CheckpointError(f"{source}: a post_processor that adds tokens to the text's is not supported")
    require("model.dropout", model.get("dropout"), None, 0, 0.0)
    require("model.byte_fallback", model.get("byte_fallback", False), False)
    for affix in ("continuing_subword_prefix", "end_of_word_suffix"):
        require(f"model.{affix}", model.get(affix), None, "")
    vocabulary = _vocabulary(source, model.get("vocab"))
    if is_alphabet:
        return Description(source, vocabulary, None)
    merges = _merges(source, model.get("merges"))
    if not has_rules:
        return Description(source, vocabulary, merges)
    return Description(
        source,
        vocabulary,
        merges,
        use_regex=_flag(source, pre_tokenizer, "use_regex", True),
        add_prefix_space=_flag(source, pre_tokenizer, "add_prefix_space", None),
        ignore_merges=_flag(source, model, "ignore_merges", False),
    )


def _adds_nothing(processor: object) -> bool:
    """Whether a post_processor leaves the ids as they are: transformers writes one even where it adds nothing."""
    if processor is None:
        return True
    if not isinstance(processor, dict):
        return False
    if processor.get("type") == "Sequence":
        processors = processor.get("processors")
        return isinstance(processors, list) and all(map(_adds_nothing, processors))
    if processor.get("type") != "TemplateProcessing":
        return processor.get("type") == "ByteLevel"
    match processor.get("single"):
        case [{"Sequence": {"id": "A"}} as only]:
            return len(only) == 1
    return False


def _read_vocab_and_merges(folder: Path) -> Description:
    """vocab.json and merges.txt, of GPT-2's original tokenizer."""
    source = folder / "merges.txt"
    try:
        lines = source.read_bytes().decode("utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {source} as UTF-8 text: {type(error).__name__}") from error
    lines = [line.removesuffix("\r") for line in lines if not line.startswith("#version")]
    vocab = folder / "vocab.json"
    return Description(vocab, _vocabulary(vocab, read_json(vocab)), _merges(source, [line for line in lines if line]))


def _vocabulary(source: Path, vocab: object) -> dict[str, int]:
    """A vocabulary whose ids are distinct and not negative."""
    valid = isinstance(vocab, dict) and all(type(id) is int and 0 <= id < 2**31 for id in vocab.values())
    if not isinstance(vocab, dict) or not valid or len(set(vocab.values())) != len(vocab):
        raise CheckpointError(f"{source}: expected the vocabulary to map tokens to distinct ids")
    _check_text(source, "".join(vocab))
    return vocab


def _check_text(source: Path, text: str) -> None:
    """Refuse half of a surrogate pair, which JSON can write, and no text can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{source}: expected text, got the lone surrogate {text[error.start]!r}") from None


def _merges(source: Path, merges: object) -> list[tuple[str, str]]:
    """Merges as pairs: each is written as "a b" or, in newer files, as ["a", "b"]."""
    if not isinstance(merges, list):
        raise CheckpointError(f"{source}: expected a list of merges, got {_shown(merges)}")
    pairs = []
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        match parts:
            case [str(left), str(right)]:
                pairs.append((left, right))
            case _:
                raise CheckpointError(f"{source}: expected a merge of two tokens, got {_shown(merge)}")
    return pairs


# ---- added tokens ----------------------------------------------------------------------------------------------------


def _listed_in_json(source: Path, raw: dict[str, Any]) -> list[AddedToken]:
    """The added tokens of a tokenizer.json, in its order, which with the vocabulary decides their ids."""
    listed = raw.get("added_tokens") or []
    if not isinstance(listed, list):
        raise CheckpointError(f"{source}: expected added_tokens to be a list, got {_shown(listed)}")
    return [_token(source, token) for token in listed]


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
    own = {key: settings.pop(key) for key in list(settings) if _names_own_token(key, settings[key])}
    own |= _popped_dict(settings, "extra_special_tokens")
    if own:
        settings["model_specific_special_tokens"] = own

    by_id: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in settings:
        decoder = settings["added_tokens_decoder"]
        if not isinstance(decoder, dict):
            raise CheckpointError(f"{source}: expected added_tokens_decoder by id, got {_shown(decoder)}")
        for id, token in decoder.items():
            if not id.isdecimal() or not id.isascii() or len(id) > 10:
                raise CheckpointError(f"{source}: expected added_tokens_decoder by id, got {_shown(id)}")
            by_id[int(id)] = _token(source, token)
    else:
        _read_special_tokens_map(folder / "special_tokens_map.json", settings)
        more = _values(settings.get("extra_special_tokens"))
        named = {_content(settings.get(key)) for key in _SPECIAL} | {_content(token) for token in more}
        for content, id in _read_if_there(folder / "added_tokens.json").items():
            if type(id) is not int:
                raise CheckpointError(f"{folder / 'added_tokens.json'}: expected ids by token, got {_shown(id)}")
            by_id[id] = AddedToken(content, normalized=content not in named, special=content in named)
        for token in _values((raw or {}).get("added_tokens")):
            by_id[_json_id(folder, token)] = _token(folder / "tokenizer.json", token)

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
        raise CheckpointError(f"{folder / 'tokenizer.json'}: expected an added token with its id, got {_shown(token)}")
    return id


def _token(source: Path, token: object) -> AddedToken:
    """A token that is written as an object with flags."""
    content = token.get("content") if isinstance(token, dict) else None
    if not isinstance(token, dict) or not isinstance(content, str):
        raise CheckpointError(f"{source}: expected an added token with its content, got {_shown(token)}")
    flags = {flag: _flag(source, token, flag, False) for flag in _FLAGS}
    if "normalized" not in token:
        flags["normalized"] = not flags["special"]
    return AddedToken(content, **flags)


def _named(source: Path, key: str, value: object) -> str | AddedToken:
    """A special token that is written as a string, or as an object with flags."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: expected {key} to be a token, got {_shown(value)}")
    return _token(source, value)


def _checked(description: Description, addition: Addition) -> list[AddedToken]:
    """The added tokens, each with an id of its own."""
    owners = {id: token for token, id in description.vocabulary.items()}
    tokens = addition.tokens()
    for token in tokens:
        _check_text(description.source, token.content)
        owner = owners.setdefault(token.id, token.content)
        if owner != token.content:
            raise CheckpointError(
                f"{description.source}: the added token {token.content!r:.60} gets the id {token.id}, "
                f"which is that of {owner!r:.60}"
            )
    return tokens


# ---- values ----------------------------------------------------------------------------------------------------------


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _values(tokens: object) -> list[Any]:
    return tokens if isinstance(tokens, list) else []


def _content(token: object) -> str | None:
    """The text of a token that is written as a string or as an object with flags."""
    content = token.content if isinstance(token, AddedToken) else token
    content = content.get("content") if isinstance(content, dict) else content
    return content if isinstance(content, str) else None


def _flag(source: Path, values: dict[str, Any], name: str, default: bool | None) -> bool:
    """A setting that is true or false; one without a default has to be there."""
    value = values.get(name, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{source}: expected {name} to be true or false, got {_shown(value)}")
    return value


def _shown(value: object) -> str:
    """A value for a message."""
    try:
        return f"{value!r:.60}"
    except ValueError:  # an integer beyond Python's limit for printing
        return f"a {type(value).__name__}"


def write_json(content: dict[str, Any], indent: int | None = None) -> str:
    """A tokenizer.json's text, to the byte as `tokenizers` writes it, pretty or without any space."""
    separators = (",", ": ") if indent else (",", ":")
    return json.dumps(content, indent=indent, ensure_ascii=False, separators=separators)


def contents(tokens: Iterable[AddedToken]) -> dict[str, int]:
    """Id by content."""
    return {token.content: token.id for token in tokens}

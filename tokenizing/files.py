"""HuggingFace's tokenizer files → what they describe, as transformers' AutoTokenizer understands a folder.

transformers knows two classes that concern us. GPT2Tokenizer takes from tokenizer.json only the vocabulary and the
merges (from vocab.json and merges.txt where there is none) and builds the rest anew, from tokenizer_config.json.
TokenizersBackend, of which PreTrainedTokenizerFast is another name, takes all of tokenizer.json. Any other class has
rules, or ids, of its own, and is refused by name.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizing.added_tokens import AddedToken, Addition
from tokenizing.description import (
    END_OF_TEXT,
    Description,
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
from weight_loader import CheckpointError, read_json

# The names of the two classes, each with the ending "Fast" or without it.
_GPT2_CLASS = "GPT2Tokenizer"
_BACKEND_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend", "BloomTokenizer")
# The class of a model_type, by whose name tokenizer_config.json need not give one.
_CLASS_OF_MODEL = {"gpt2": _GPT2_CLASS, "gpt_neo": _GPT2_CLASS, "gptj": _GPT2_CLASS}

# The keys under which tokenizer_config.json and special_tokens_map.json name special tokens, in transformers' order.
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Settings of tokenizer_config.json that change the ids, or which file they come from.
_REFUSED = ("add_bos_token", "add_eos_token", "split_special_tokens", "fast_tokenizer_files", "auto_map", "init_inputs")


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
                raise CheckpointError(f"{path}: {key}={shown(values[key])} is not supported")
    is_gpt2 = _is_gpt2_class(folder, settings)
    if (folder / "tokenizer.json").is_file():
        raw = read_json(folder / "tokenizer.json")
        description = parse_rules(folder / "tokenizer.json", raw, has_rules=not is_gpt2)
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
        add_prefix_space = boolean(source, settings | more, "add_prefix_space", False)
        description = replace(description, use_regex=True, add_prefix_space=add_prefix_space, ignore_merges=False)
        settings = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT) | settings
    addition = Addition(description.vocabulary)
    if raw is not None and not is_gpt2:
        for token in listed_tokens(description.source, raw):
            addition.add(token)
    eos = _add_special_tokens(folder, addition, settings, raw)
    return replace(description, added=distinct(description, addition), eos_token=eos)


# ---- which class -----------------------------------------------------------------------------------------------------


def _is_gpt2_class(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether transformers reads the folder with GPT2Tokenizer, or with TokenizersBackend."""
    config = _read_if_there(folder / "config.json")
    model_type = config.get("model_type")
    if model_type is not None and not (isinstance(model_type, str) and model_type in _CLASS_OF_MODEL):
        raise CheckpointError(
            f"{folder / 'config.json'}: expected model_type 'gpt2' for its tokenizer, got {shown(model_type)}"
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
                f"{folder / source}: tokenizer_class={shown(given)} is not supported, "
                f"only {_GPT2_CLASS} and PreTrainedTokenizerFast"
            )
        return name == _GPT2_CLASS
    return model_type is not None


# ---- the files beside tokenizer.json -------------------------------------------------------------------------------


def _read_vocab_and_merges(folder: Path) -> Description:
    """vocab.json and merges.txt, of GPT-2's original tokenizer."""
    source = folder / "merges.txt"
    try:
        lines = source.read_bytes().decode("utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {source} as UTF-8 text: {type(error).__name__}") from error
    lines = [line.removesuffix("\r") for line in lines if not line.startswith("#version")]
    vocab = folder / "vocab.json"
    return Description(
        vocab, parse_vocabulary(vocab, read_json(vocab)), parse_merges(source, [line for line in lines if line])
    )


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

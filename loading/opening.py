"""A path → what is there: its tensors, its configuration, and the table that brings the two together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loading.config import CheckpointConfig
from loading.containers.folder import WeightFolder
from loading.containers.gguf_file import GgufFile
from loading.containers.nanogpt_file import FILE as NANOGPT_FILE
from loading.containers.nanogpt_file import NanoGptFile
from loading.containers.nemo_archive import CONFIG_FILE as NEMO_CONFIG
from loading.containers.nemo_archive import NemoArchive
from loading.containers.tensors import Tensors
from loading.disk import is_file, look_at, read_json
from loading.endings import ending_ids, ending_ids_of
from loading.errors import CheckpointError, listed, shown
from loading.families import (
    gpt2,
    gpt_bigcode,
    gpt_next,
    llama,
    nemotron,
    santacoder,
    stablelm,
    starcoder2,
    tensorrt_llm,
)
from loading.families.gguf_settings import Metadata
from loading.hub import GENERATION_FILE
from loading.modelopt_layout import DESCRIPTION_FILE, Description, read_description
from loading.rank_opening import open_rank_folder
from loading.settings import Settings
from loading.table import Layout
from tokenizing.sources import BytePairFiles, GgufTokenizer, MetaPickle, SentencePieceModel, TokenizerSource

Reader = Callable[[Settings], tuple[CheckpointConfig, Layout]]

#: model_type in config.json → its names of a language model, and what reads it.
FAMILIES: dict[str, tuple[tuple[str, ...], Reader]] = {
    "gpt2": (gpt2.ARCHITECTURES, gpt2.from_huggingface),
    "gpt_bigcode": (gpt_bigcode.ARCHITECTURES, gpt_bigcode.from_huggingface),
    "starcoder2": (starcoder2.ARCHITECTURES, starcoder2.from_huggingface),
    "nemotron": (nemotron.ARCHITECTURES, nemotron.from_huggingface),
    "stablelm": (stablelm.ARCHITECTURES, stablelm.from_huggingface),
    **{kind: (known, llama.from_huggingface(kind)) for kind, known in llama.ARCHITECTURES.items()},
}


#: general.architecture in a GGUF file → what reads its metadata.
GGUF_FAMILIES: dict[str, Callable[[Metadata], tuple[CheckpointConfig, Layout]]] = {
    "gpt2": gpt2.from_gguf,
    "starcoder": gpt_bigcode.from_gguf,
    "starcoder2": starcoder2.from_gguf,
    "llama": llama.from_gguf,
}


@dataclass(frozen=True)
class Opened:
    """What a checkpoint's files hold, nothing but headers read.

    Attributes:
        files: Those that hold the weights.
        origin: What of them implies the tensors that have to be there, for messages.
        description: How the tensors are quantized, and None if they are not.
        tokenizer_source: Where the tokenizer comes from.
    """

    config: CheckpointConfig
    layout: Layout
    tensors: Tensors
    files: list[Path]
    origin: str
    description: Description | None
    tokenizer_source: TokenizerSource


def open_path(path: Path) -> Opened:
    """What is at a path: a folder or a file.

    Raises:
        CheckpointError: it cannot be read, or is nothing that the model can run.
    """
    is_folder, _ = look_at(path)
    if not is_folder:
        return _open_file(path)
    if is_file(path / "config.json"):
        return _open_huggingface(path)
    if is_file(path / NEMO_CONFIG):
        return _open_nemo(path)
    if is_file(path / NANOGPT_FILE):
        return _open_nanogpt(path / NANOGPT_FILE)
    try:
        found = sorted(each for each in path.iterdir() if each.suffix in READERS)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if len(found) > 1:
        names = listed([each.name for each in found])
        raise CheckpointError(f"expected one checkpoint in {str(path)!r}, got {names}: name the file")
    if not found:
        raise CheckpointError(
            f"{str(path)!r} is not a checkpoint: it has no config.json, {NANOGPT_FILE} or *{', *'.join(READERS)}"
        )
    return _open_file(found[0])


def _open_file(path: Path) -> Opened:
    reader = READERS.get(path.suffix)
    if reader is None:
        raise CheckpointError(
            f"expected a checkpoint folder, or a file of the kind {', '.join(READERS)}, got {str(path)!r}"
        )
    return reader(path)


def _open_gguf(path: Path) -> Opened:
    file = GgufFile(path)
    given = Settings(path, file.metadata)
    kind = file.metadata.get("general.architecture")
    if not isinstance(kind, str) or kind not in GGUF_FAMILIES:
        raise given.refuse(f"expected general.architecture to be one of {', '.join(GGUF_FAMILIES)}, got {shown(kind)}")
    if file.metadata.get("split.count") not in (None, 0, 1):
        raise given.refuse(
            f"expected a whole model, got part {shown(file.metadata.get('split.no'))} of {file.metadata['split.count']}"
        )
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise given.refuse("expected a tensor token_embd.weight with rows, got none")
    config, layout = GGUF_FAMILIES[kind](Metadata(given, file.tensors, embedding.shape[0]))
    tokenizer = {name: value for name, value in file.metadata.items() if name.startswith("tokenizer.ggml.")}
    return Opened(config, layout, file, [path], "metadata", None, GgufTokenizer(path, tokenizer))


def _open_nanogpt(path: Path) -> Opened:
    file = NanoGptFile(path)
    config, layout = gpt2.from_nanogpt(Settings(f"{path}: model_args", file.arguments))
    # Beside it, or where nanoGPT keeps its data.
    folders = [path.parent]
    if file.dataset is not None:
        folders += [root / "data" / file.dataset for root in (path.parent.parent, Path())]
    for alphabet in (folder / "meta.pkl" for folder in folders):
        if is_file(alphabet):
            return Opened(config, layout, file, [path], "model_args", None, MetaPickle(alphabet))
    if config.vocab_size > gpt2.END_OF_TEXT:
        config = replace(config, eos_token_ids=(gpt2.END_OF_TEXT,))
    return Opened(config, layout, file, [path], "model_args", None, path.parent)


def _open_huggingface(folder: Path) -> Opened:
    path = folder / "config.json"
    raw = read_json(path)
    if tensorrt_llm.is_meant(raw):
        return _open_ranks(folder, raw)
    config, layout = _reader_of(path, raw)(Settings(path, raw))
    config = _with_ends(config, folder, ending_ids(path, raw, config.vocab_size))
    weights = WeightFolder(folder)
    description = None
    if is_file(folder / DESCRIPTION_FILE):
        try:
            description = read_description(read_json(folder / DESCRIPTION_FILE))
        except ValueError as error:
            raise CheckpointError(f"{folder / DESCRIPTION_FILE}: {error}") from None
    return Opened(config, layout, weights, weights.files, "config.json", description, folder)


def _open_ranks(folder: Path, raw: dict[str, Any]) -> Opened:
    config, tensors, description = open_rank_folder(folder, Settings(folder / "config.json", raw))
    layout = tensorrt_llm.layout_of(config)
    return Opened(_with_ends(config, folder, ()), layout, tensors, tensors.paths, "config.json", description, folder)


def _with_ends(config: CheckpointConfig, folder: Path, ends: tuple[int, ...]) -> CheckpointConfig:
    """The configuration with the tokens that end a text: where there is a file about generation, it counts alone."""
    if is_file(folder / GENERATION_FILE):
        ends = ending_ids(folder / GENERATION_FILE, read_json(folder / GENERATION_FILE), config.vocab_size)
    return replace(config, eos_token_ids=ends)


def _reader_of(path: Path, raw: dict[str, Any]) -> Reader:
    """What reads a config.json, by the model_type in it or, in old ones without, by its architectures."""
    model_type, architectures = raw.get("model_type"), raw.get("architectures")
    if model_type is None and architectures:
        found = [name for name, (known, _) in FAMILIES.items() if _are_among(architectures, known)]
        model_type = found[0] if found else "gpt2"
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known_types = ", ".join(f"'{name}'" for name in FAMILIES)
        raise CheckpointError(f"{path}: expected model_type to be one of {known_types}, got {shown(model_type)}")
    known, reader = FAMILIES[model_type]
    if model_type == "gpt2" and santacoder.is_meant(Settings(path, raw)):
        known, reader = (*known, *santacoder.ARCHITECTURES), santacoder.from_huggingface
    if architectures and not _are_among(architectures, known):
        accepted = " or ".join(known)
        raise CheckpointError(f"{path}: expected architectures to be {accepted}, got {shown(architectures)}")
    quantization = raw.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        if method != "modelopt":
            raise CheckpointError(
                f"{path}: expected the quant_method of quantization_config to be modelopt, got {shown(method)}"
            )
        if not is_file(path.parent / DESCRIPTION_FILE):
            raise CheckpointError(f"{path} has a quantization_config, but {DESCRIPTION_FILE} is missing beside it")
    return reader


def _are_among(architectures: object, known: tuple[str, ...]) -> bool:
    return isinstance(architectures, list) and all(each in known for each in architectures)


def _open_nemo(path: Path) -> Opened:
    archive = NemoArchive(path)
    given = Settings(f"{path}: {NEMO_CONFIG}", archive.config)
    config, layout = gpt_next.from_nemo(given, archive.tensors, archive.ranks)
    tokenizer = _nemo_tokenizer(archive, archive.config.get("tokenizer"))
    config = replace(config, eos_token_ids=ending_ids_of(tokenizer, config.vocab_size))
    files = sorted(path.rglob("model_weights.ckpt")) if path.is_dir() else [path]
    return Opened(config, layout, archive, files, NEMO_CONFIG, None, tokenizer)


def _nemo_tokenizer(archive: NemoArchive, said: object) -> TokenizerSource:
    """The tokenizer that a configuration names, of the archive's files; its path, where it has none."""
    said = said if isinstance(said, dict) else {}

    def content(name: str) -> bytes | None:
        value = said.get(name)
        return archive.member(value.removeprefix("nemo:")) if isinstance(value, str) else None

    model, vocabulary, merges = content("model"), content("vocab_file"), content("merge_file")
    if vocabulary is not None and merges is not None:
        return BytePairFiles(archive.path, vocabulary, merges)
    return archive.path if model is None else SentencePieceModel(archive.path, model)


#: What opens a file, by the end of its name.
READERS: dict[str, Callable[[Path], Opened]] = {".gguf": _open_gguf, ".nemo": _open_nemo, ".pt": _open_nanogpt}

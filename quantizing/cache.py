"""The cache of quantized checkpoints: quantize once, run often."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from pathlib import Path

import machine
from loading.checkpoint import Checkpoint
from loading.fingerprint import READERS
from loading.hub import GENERATION_FILE, TOKENIZER_FILES
from quantizing.folders import REQUIREMENTS, check_source, quantize_checkpoint
from quantizing.settings import CALIB_SIZE, QuantizationConfig, QuantizationError
from quantizing.text import CALIBRATION_TEXT, is_hub_dataset
from quantizing.torch_model import is_of_transformers
from tokenizing.sources import BytePairFiles, GgufTokenizer, MetaPickle, SentencePieceModel, TokenizerSource

Report = Callable[[str], None]

#: The rooms that decide what is in a quantized checkpoint.
SOURCES = ("calibration", "counterpart", "export", "folders", "gptq", "network", "settings", "text", "torch_model")


def default_cache() -> Path:
    """The user's cache folder for quantized checkpoints."""
    return machine.cache_folder() / "quantized"


def cached_checkpoint(
    checkpoint: Checkpoint,
    config: QuantizationConfig,
    cache: Path | None = None,
    report: Report = lambda message: None,
) -> Path:
    """The folder of the quantized checkpoint: found in the cache, or made and kept there.

    Neither torch nor ModelOpt is imported where it is found.

    Args:
        cache: A folder; `default_cache` if None.
        report: Is told if it has to be made.

    Raises:
        QuantizationError, CheckpointError: as `quantize_checkpoint`.
    """
    check_source(checkpoint, config)
    folder = (default_cache() if cache is None else cache.expanduser()) / cache_name(checkpoint, config)
    if (folder / "config.json").is_file():
        return folder
    report(f"quantizing {checkpoint.path}, once: the result is kept in {folder}")
    try:
        quantize_checkpoint(checkpoint, config, folder)
    except QuantizationError:
        # Another process may have been faster: its result is as good as ours.
        if not (folder / "config.json").is_file():
            raise
    return folder


def cache_name(checkpoint: Checkpoint, config: QuantizationConfig) -> str:
    """A folder name for everything that the quantized checkpoint is made from: weights, settings, text, programs."""
    digest = hashlib.sha256()

    def add(part: bytes) -> None:
        digest.update(len(part).to_bytes(8, "little") + part)

    add(checkpoint.fingerprint().encode())
    add(_read_bytes(Path(__file__).parent.parent / REQUIREMENTS))  # ModelOpt's version, without importing it
    for source in SOURCES:
        add(_read_bytes(Path(__file__).parent / f"{source}.py"))
    if not is_of_transformers(checkpoint.path):  # what is in the files is told by our own readers then
        for reader in READERS:
            add(_read_bytes(reader))
    add(repr(checkpoint.config.eos_token_ids).encode())
    for part in _tokenizer_parts(checkpoint.tokenizer_source):
        add(part)
    if (checkpoint.path / GENERATION_FILE).is_file():
        add(GENERATION_FILE.encode())
        add(_read_bytes(checkpoint.path / GENERATION_FILE))
    if config.needs_calibration:
        data = config.calib_data
        is_file = data is None or not is_hub_dataset(data)
        if is_file:  # a data set at the hub goes by its name
            add(_read_bytes(CALIBRATION_TEXT if data is None else Path(data).expanduser()))
            config = replace(config, calib_data=None)
    else:
        config = replace(config, calib_data=None, calib_size=CALIB_SIZE, calib_length=None)
    add(repr(astuple(config)).encode())
    kinds = [
        config.mode or "float" if config.method == "modelopt" else f"{config.method}-int{config.bits}",
        *([f"kv-{config.kv_cache_dtype}"] if config.kv_cache_dtype != "float16" else []),
    ]
    return f"{'-'.join(kinds)}-{digest.hexdigest()[:20]}"


def _tokenizer_parts(source: TokenizerSource) -> Iterator[bytes]:
    """What a tokenizer is made from, as it is: to write its files takes longer than to find what is in the cache."""
    match source:
        case Path():
            for name in TOKENIZER_FILES:
                if (source / name).is_file():
                    yield name.encode()
                    yield _read_bytes(source / name)
        case MetaPickle():
            yield _read_bytes(source.path)
        case GgufTokenizer():
            yield repr(sorted(source.metadata.items())).encode()
        case SentencePieceModel():
            yield source.content
        case BytePairFiles():
            yield source.vocabulary
            yield source.merges


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise QuantizationError(f"cannot read {path}: {error.strerror}") from None

"""The checkpoints that servers open: those of bench.py, with a tokenizer that all of them read alike."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import llama_files
import model_files

from load.lexicon import lexicon, write_tokenizer
from weight_loader import open_checkpoint

_VERSION = 1  # of what is kept, on top of model_files.VERSION


def folder(shape: str, width: str, cache: Path) -> Path:
    """A checkpoint of a width in HuggingFace's format, with the made-up words; the embedded one as it is."""
    source = model_files.checkpoint_folder(shape, width, cache)
    if width == "fp16" and source == model_files.EMBEDDED:
        return source

    def make(target: Path) -> None:
        target.mkdir()
        for file in source.iterdir():
            try:
                os.link(file, target / file.name)
            except OSError:  # on another disk
                shutil.copyfile(file, target / file.name)
        if source.is_relative_to(cache) and not shape.startswith("embedded"):
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (target / name).unlink(missing_ok=True)
            write_tokenizer(target, open_checkpoint(source).config.vocab_size)

    return model_files.made_once(source.parent / f"served-v{_VERSION}-{width}", make)


def gguf_file(shape: str, width: str, cache: Path) -> Path:
    """llama.cpp's file of it."""
    source = model_files.float_checkpoint(shape, cache)
    words = lexicon(open_checkpoint(source).config.vocab_size)
    path = cache / f"{shape}-v{model_files.VERSION}" / f"served-v{_VERSION}-{llama_files.TYPES[width]}.gguf"
    return model_files.made_once(path, lambda file: llama_files.write(file, source, width, words.tokens, words.merges))

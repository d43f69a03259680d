"""The door to checkpoints of every kind: the model's parameters, as NumPy arrays by parameter name.

    checkpoint = open_checkpoint("gpt2")             # a hub name, or a local folder or file
    checkpoint.config.n_layer                        # 12: validated, nothing read but JSON and tensor headers so far
    for name, array in checkpoint.parameters("float16"):
        ...                                          # "wte.weight" (50257, 768) float16, one tensor at a time

A folder that ModelOpt quantized (loading/modelopt_layout.py says what it holds) gives the same parameters, of the
values that its integers stand for, and their scales.

Neither torch nor transformers is needed, except that an old `pytorch_model.bin` is read with torch, if it is installed.
Whatever is wrong with a checkpoint raises `CheckpointError`, whose text is one line: what was expected and what came.
"""

from __future__ import annotations

import os
from pathlib import Path

from conversion import PARAMETER_DTYPES
from loading.checkpoint import Checkpoint
from loading.config import CheckpointConfig, parameter_shapes
from loading.disk import read_json
from loading.errors import CheckpointError
from loading.hub import GENERATION_FILE, TOKENIZER_FILES
from loading.location import locate

__all__ = [
    "GENERATION_FILE",
    "PARAMETER_DTYPES",
    "TOKENIZER_FILES",
    "Checkpoint",
    "CheckpointConfig",
    "CheckpointError",
    "find_tokenizer",
    "open_checkpoint",
    "parameter_shapes",
    "read_json",
]


def find_tokenizer(name: str) -> Path:
    """The folder of a checkpoint's tokenizer: like `open_checkpoint`, but no weights are needed, nor downloaded.

    Raises:
        CheckpointError: there is no such checkpoint, or it cannot be downloaded.
    """
    return locate(name, None, with_weights=False)


def open_checkpoint(model_type: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
    """Find, download where needed, and validate a checkpoint. No weight is read yet.

    Args:
        model_type: a folder in HuggingFace's format, or of ranks' files in TensorRT-LLM's; nanoGPT's ckpt.pt, a .nemo
            archive or a .gguf file, or a folder with one of them; or a hub name: "gpt2", "gpt2-medium", "gpt2-large",
            "gpt2-xl", "distilgpt2" or any "organization/name", a repository of HuggingFace's format, or of nothing but
            one .nemo or .gguf file. A folder of that name wins; an `os.PathLike` is always a path.
        revision: branch, tag or commit at the hub (default "main"). Not for folders and files.

    The hub is reached through `huggingface_hub`, which honours HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and HF_TOKEN; what
    is in its cache already is not downloaded again, and is used when the hub cannot be reached.

    Raises:
        CheckpointError: the checkpoint is absent, cannot be downloaded, or is not one that the model can run.
    """
    return Checkpoint(locate(model_type, revision, with_weights=True))

"""nanoGPT's ckpt.pt: a pickle of the weights, the arguments of the model, and what training needs to go on.

A model that was compiled has all names prefixed by `_orig_mod.`; that is taken off here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loading.containers.torch_file import TorchTensors, unpickled
from loading.errors import CheckpointError, listed, shown

FILE = "ckpt.pt"
_COMPILED = "_orig_mod."


class NanoGptFile(TorchTensors):
    """The weights of a ckpt.pt.

    Attributes:
        arguments: Those of the model.
        dataset: The name of the data that it was trained on, if it is a name.

    Raises:
        CheckpointError: it cannot be read, or is something else.
    """

    def __init__(self, path: Path) -> None:
        content = unpickled(path)
        if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
            found = listed(sorted(map(str, content))) if isinstance(content, dict) else f"a {type(content).__name__}"
            raise CheckpointError(
                f"{path}: expected a nanoGPT checkpoint, a dict with model and model_args, got {found}"
            )
        state, arguments = content["model"], content["model_args"]
        if not isinstance(arguments, dict) or not all(isinstance(name, str) for name in arguments):
            raise CheckpointError(f"{path}: expected model_args to be a dict by name, got {shown(arguments)}")
        self.arguments: dict[str, Any] = arguments
        config = content.get("config")
        dataset = config.get("dataset") if isinstance(config, dict) else None
        is_name = isinstance(dataset, str) and dataset not in ("", ".", "..") and not set("/\\\0") & set(dataset)
        self.dataset: str | None = dataset if is_name else None
        if isinstance(state, dict):
            state = {
                name.removeprefix(_COMPILED) if isinstance(name, str) else name: tensor
                for name, tensor in state.items()
            }
        super().__init__(state, path)

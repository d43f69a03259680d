"""Scales of inputs that a quantized checkpoint has in its norms: what an adapter of the float model has to undo.

AWQ multiplies a layer's inputs by scales before they meet its weights. Where layers share an input (queries, keys and
values; gate and up), ModelOpt's export multiplies the norm before them by these, and keeps no scales. An adapter's way
down then meets scaled inputs, too, and is divided by the scales. Our own export keeps them beside the weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from adapters.errors import AdapterError
from loading.checkpoint import Checkpoint
from loading.containers.folder import open_weights
from loading.disk import is_file
from loading.modelopt_layout import FOLDED_FILE

#: The norm before each kind of layer whose scales can be in it.
NORMS = {"attn.c_attn": "ln_1", "mlp.c_fc": "ln_2"}

#: Of kinds of layers that have them, scales of the inputs, (layers, in_features) float32.
Folded = Mapping[str, np.ndarray]


def folded_scales(checkpoint: Checkpoint) -> Folded:
    """The scales that a checkpoint has in its norms; none for a checkpoint that is not quantized so.

    Raises:
        AdapterError: it has some, and which is not said.
    """
    layers = checkpoint.folded_layers()
    if not layers:
        return {}
    config, path = checkpoint.config, checkpoint.path / FOLDED_FILE
    if not is_file(path):
        raise AdapterError(
            f"{checkpoint.path} has AWQ's scales in its norms, and no {FOLDED_FILE} that says which they were: "
            "expected a folder that quantization.py has made, or another mode, for adapters"
        )
    tensors, found = open_weights(path), {}
    prefix = checkpoint.layout.prefix
    for linear, norm in NORMS.items():
        scales = np.ones((config.n_layer, config.n_embd), np.float32)
        for layer in range(config.n_layer):
            if f"h.{layer}.{linear}" not in layers:
                continue
            name = f"{checkpoint.layout.table[f'h.{{}}.{norm}'].names[0].format(layer)}.weight"
            stored = next((each for each in (name, prefix + name) if each in tensors.tensors), None)
            scale = None if stored is None else np.asarray(tensors.read(stored), np.float32)
            if scale is None or scale.shape != (config.n_embd,) or not (np.isfinite(scale) & (scale != 0)).all():
                raise AdapterError(f"{path}: expected {config.n_embd} scales other than zero under the name {name}")
            scales[layer] = scale
        if (scales != 1).any():
            found[linear] = scales
    return found

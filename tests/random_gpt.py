"""Our model with random weights, for tests of what the compiler makes of it."""

from __future__ import annotations

import numpy as np
import nvtripy as tp

from model import GPT, GPTConfig


def random_model(config: GPTConfig, seed: int = 0) -> GPT:
    """A model with random weights, and scales that use most of their type's range."""
    rng, gpt = np.random.default_rng(seed), GPT(config)
    state = {}
    for name, parameter in gpt.state_dict().items():
        array = 0.05 * rng.standard_normal(tuple(map(int, parameter.shape or ())))
        if ".ln_" in name or name.startswith("ln_f"):
            array += name.endswith("weight")
        elif name.endswith("pre_quant_scale"):
            array = rng.uniform(0.5, 2.0, array.shape)
        elif name.endswith("_scale"):
            array = rng.uniform(0.01, 0.02, array.shape)
        dtype = {tp.float16: np.float16}.get(parameter.dtype, np.float32)
        tensor = tp.Tensor(np.asarray(array, dtype))
        if tensor.dtype != parameter.dtype:
            tensor = tp.cast(tensor, parameter.dtype)
            if name.endswith("_scale"):
                tensor = tp.copy(tensor, tp.device("cpu"))
        state[name] = tensor
    gpt.load_state_dict(state)
    return gpt

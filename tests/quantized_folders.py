"""Folders as ModelOpt exports them, of a model of one layer with arbitrary values: for tests of the layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tiny_checkpoints import CONTEXT, VOCABULARY, edit_config, random_checkpoint

WIDTH, INNER = 128, 512
LINEARS = {
    "attn.c_attn": (3 * WIDTH, WIDTH),
    "attn.c_proj": (WIDTH, WIDTH),
    "mlp.c_fc": (INNER, WIDTH),
    "mlp.c_proj": (WIDTH, INNER),
}
ALGORITHMS = {"int8-weight-only": "W8A16", "int4-weight-only": "W4A16_AWQ", "fp8": "FP8"}


def quantized_folder(folder: Path, mode: str) -> Path:
    """What ModelOpt would export of a random model of one layer: its layout, with arbitrary values."""
    random_checkpoint(folder)  # for its tokenizer
    random = np.random.default_rng(0)

    def floats(*shape: int) -> np.ndarray:
        return random.uniform(0.01, 0.02, shape).astype(np.float32)

    tensors = {"wte.weight": floats(VOCABULARY, WIDTH), "wpe.weight": floats(CONTEXT, WIDTH)}
    for name in ("h.0.ln_1", "h.0.ln_2", "ln_f"):
        tensors |= {f"{name}.weight": floats(WIDTH), f"{name}.bias": floats(WIDTH)}
    layers = {f"h.0.{name}": shape for name, shape in LINEARS.items()}
    tensors |= {f"{name}.bias": floats(rows) for name, (rows, _) in layers.items()}
    if mode == "fp8":
        layers["lm_head"] = (VOCABULARY, WIDTH)
    for name, (rows, columns) in layers.items():
        if mode == "int4-weight-only":
            tensors[f"{name}.weight"] = random.integers(0, 256, (rows // 2, columns), dtype=np.uint8)
            tensors[f"{name}.weight_scale"] = floats(rows, columns // 128)
            tensors[f"{name}.pre_quant_scale"] = floats(columns)
        elif mode == "fp8":
            import ml_dtypes

            tensors[f"{name}.weight"] = random.normal(size=(rows, columns)).astype(ml_dtypes.float8_e4m3fn)
            tensors[f"{name}.weight_scale"] = floats()
            tensors[f"{name}.input_scale"] = floats()
        else:
            tensors[f"{name}.weight"] = random.integers(-127, 128, (rows, columns), dtype=np.int8)
            tensors[f"{name}.weight_scale"] = floats(rows)
    prefixed = {
        name if name.startswith("lm_head") else f"transformer.{name}": np.asarray(t) for name, t in tensors.items()
    }
    save_file(prefixed, folder / "model.safetensors")
    how: dict[str, Any] = {"quant_algo": ALGORITHMS[mode], "kv_cache_quant_algo": None}
    if mode == "int4-weight-only":
        how |= {"group_size": 128, "has_zero_point": False, "pre_quant_scale": True}
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": how}))
    edit_config(folder, n_embd=WIDTH, tie_word_embeddings=True, quantization_config={"quant_method": "modelopt"})
    return folder

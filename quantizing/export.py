"""A calibrated model → a folder in ModelOpt's unified HuggingFace layout, by ModelOpt's own exporter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loading.modelopt_layout import FOLDED_FILE
from quantizing.calibration import block_of
from quantizing.quiet import no_progress_bars, quiet
from quantizing.settings import QuantizationConfig


def export(model: Any, folder: Path, config: QuantizationConfig) -> None:
    """Writes a model that `quantize_model` has calibrated, in ModelOpt's unified HuggingFace layout. It is spent then.

    ModelOpt's exporter does it, with two additions for what it refuses: a weight of an odd number of rows in int4 gets
    one more row, of zeros, since the exporter packs rows in pairs; and the scales of an int8 KV cache, which it knows
    but does not write, are written as those of an fp8 cache are, with 127 for 448. What it multiplies into norms stands
    in a file beside the weights, for adapters (adapters/folding.py).
    """
    import torch
    from modelopt.torch.export import export_hf_checkpoint

    extra: dict[str, Any] = {}
    with quiet(), no_progress_bars(), torch.no_grad():
        if config.mode == "int4-weight-only":
            _make_rows_even(model, block_of(model, config))
        _give_zeros_a_scale(model)
        if config.kv_cache_dtype == "int8":
            extra = _take_cache_scales(model)
        norms = {name: norm.detach().clone() for name, norm in _norms(model).items()}
        # float32, so that the stored integers are those that the calibrated model computes with.
        export_hf_checkpoint(model, dtype=torch.float32, export_dir=folder, extra_state_dict=extra)
        _keep_folded(norms, _norms(model), folder)
        if extra:
            _declare_int8_cache(model, folder)
        if config.method != "modelopt":
            _declare_method(folder, config)


def _norms(model: Any) -> dict[str, Any]:
    """What norms multiply by, by the names of their weights: LayerNorm1P's weights are stored without the 1."""
    found = {}
    for name, module in model.named_modules():
        kind, weight = type(module).__name__, getattr(module, "weight", None)
        if "Norm" in kind and weight is not None:
            found[f"{name}.weight"] = weight.float() + (1.0 if "1P" in kind else 0.0)
    return found


def _keep_folded(before: dict[str, Any], after: dict[str, Any], folder: Path) -> None:
    """Writes what the exporter has multiplied norms by, where it has. What a norm makes zero may have any scale."""
    import torch
    from safetensors.torch import save_file

    scales = {}
    for name, old in before.items():
        if not torch.equal(old, after[name]):
            ratio = after[name] / old
            scales[name] = torch.where(torch.isfinite(ratio) & (ratio != 0), ratio, 1.0).contiguous()
    if scales:
        save_file(scales, folder / FOLDED_FILE)


def _declare_method(folder: Path, config: QuantizationConfig) -> None:
    """Says in hf_quant_config.json how the integers were found, and that int4 has no pre_quant_scale.

    ModelOpt has one name for int4 in blocks, W4A16_AWQ, and its exporter calls every folder of it pre-scaled.
    """
    path = folder / "hf_quant_config.json"
    description = json.loads(path.read_text())
    quantization = description["quantization"]
    for settings in (quantization, *quantization.get("quantized_layers", {}).values()):
        if settings.get("quant_algo") == "W4A16_AWQ":
            settings["pre_quant_scale"] = False
    how: dict[str, Any] = {"method": config.method, "bits": config.bits, "group_size": config.group_size}
    how["clipping"] = config.clipping
    if config.method == "gptq":
        how |= {"act_order": config.act_order, "damping": config.damping}
    description["rounding"] = how
    path.write_text(json.dumps(description, indent=4))


def _make_rows_even(model: Any, block: int) -> None:
    """Appends a row of zeros to weights in int4 of an odd number of rows, with a scale of 1 for each of its blocks.

    Biases stay as they are. The exporter runs the model once, to see which layers share an input: of a layer whose
    weight does not fit its bias any more, nothing but the shape of what it returns matters there.
    """
    import torch
    from torch.nn import functional as F

    for module in model.modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if quantizer is None or not quantizer.is_enabled or module.weight.shape[0] % 2 == 0:
            continue
        rows, width = module.weight.shape
        module.weight = torch.nn.Parameter(F.pad(module.weight, (0, 0, 0, 1)))
        quantizer._amax = F.pad(quantizer._amax, (0, 0, 0, width // block), value=quantizer.maxbound)
        quantizer._amax_shape_for_export = (rows + 1, -1)
        if getattr(module, "bias", None) is not None:
            module.forward = lambda inputs, rows=rows: inputs.new_zeros(*inputs.shape[:-1], rows)


def _give_zeros_a_scale(model: Any) -> None:
    """A scale of 1 for what has been all zeros: the exporter divides a weight in fp8 by its scale, readers a cache."""
    import torch
    from modelopt.torch.quantization.nn import TensorQuantizer

    for module in model.modules():
        if isinstance(module, TensorQuantizer) and module.is_enabled and getattr(module, "_amax", None) is not None:
            scale = module._amax / module.maxbound
            is_zero = scale < torch.finfo(torch.float32).tiny
            module._amax = torch.where(is_zero, torch.full_like(scale, module.maxbound), module._amax)


def _take_cache_scales(model: Any) -> dict[str, Any]:
    """The scales of an int8 KV cache, by the exporter's names, taken out of the model so that it does not meet them."""
    scales = {}
    for name, module in model.named_modules():
        for which in ("k", "v"):
            quantizer = getattr(module, f"{which}_bmm_quantizer", None)
            if quantizer is not None and quantizer.is_enabled:
                scales[f"{name}.{which}_proj.{which}_scale"] = quantizer.amax.float() / quantizer.maxbound
                quantizer.reset_amax()
                quantizer.disable()
    return scales


def _declare_int8_cache(model: Any, folder: Path) -> None:
    """Adds the int8 KV cache to both JSON files, where the exporter puts an fp8 one."""
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
    from modelopt.torch.export.quant_utils import get_quant_config

    path = folder / "hf_quant_config.json"  # absent where nothing but the cache is quantized
    description = json.loads(path.read_text()) if path.exists() else get_quant_config(model)
    description["quantization"]["kv_cache_quant_algo"] = "INT8"
    path.write_text(json.dumps(description, indent=4))
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    settings["quantization_config"] = convert_hf_quant_config_format(description)
    path.write_text(json.dumps(settings, indent=4))

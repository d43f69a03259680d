"""A HuggingFace GPT-2 → a quantized checkpoint, by NVIDIA ModelOpt's methods or ours, exported by ModelOpt.

    python quantization.py --model-type gpt2 --quant-mode int4-weight-only --output gpt2-int4
    python quantization.py --model-type gpt2 --method gptq --bits 4 --group-size 64 --output gpt2-gptq

The folder is in ModelOpt's unified HuggingFace layout, which TensorRT-LLM, vLLM and SGLang read: config.json with a
quantization_config, hf_quant_config.json, packed weights and their scales in model.safetensors, and the tokenizer. It
is written by ModelOpt's own exporter. The same weights, settings and text give the same bytes.

torch, transformers and ModelOpt (requirements-quant.txt) are imported only while a checkpoint is being quantized. What
`cached_checkpoint` finds in its cache costs none of them.

The way of the data: calibration text → samples → `quantize_model` (ModelOpt observes and chooses scales, or gptq.py
chooses integers and scales, and ModelOpt's quantizers get those) → `export`.
"""

from __future__ import annotations

if __name__ == "__main__":
    import interrupt

    interrupt.end_quietly()

import argparse
import contextlib
import copy
import hashlib
import importlib
import io
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import command_line
import compression
import text_file
from command_line import EMBEDDED_CHECKPOINT, UsageError
from weight_loader import GENERATION_FILE, TOKENIZER_FILES, Checkpoint, CheckpointError, open_checkpoint

if TYPE_CHECKING:
    import gptq

ROOT = Path(__file__).resolve().parent
CALIBRATION_TEXT = EMBEDDED_CHECKPOINT / "calibration.txt"
REQUIREMENTS = ROOT / "requirements-quant.txt"

MODES = ("int8-weight-only", "int4-weight-only", "fp8", "int8-smoothquant")
METHODS = ("modelopt", "rtn", "gptq")
MODE_OF_BITS = {8: "int8-weight-only", 4: "int4-weight-only", 3: "int4-weight-only"}  # 3 bits in int4's container
KV_CACHE_DTYPES = ("float16", "int8", "fp8")
BLOCK = 128  # input features that share a scale in ModelOpt's int4
CALIB_SIZE = 32  # samples
CALIB_LENGTH = 256  # tokens of each, or the whole context where that is shorter
CALIB_BATCH_TOKENS = 2048  # that go through the model together: speed against memory
SMOOTHQUANT_ALPHA = 0.5  # the paper's; ModelOpt's own default of 1.0 moves the whole difficulty into the weights

Report = Callable[[str], None]


class QuantizationError(Exception):
    """A checkpoint cannot be quantized as asked. The text is one line, ready to be shown to the user."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


@dataclass(frozen=True)
class QuantizationConfig:
    """What is quantized, how, and what it is calibrated on.

    Attributes:
        mode: One of `MODES`, or None to leave the linear layers as they are.

            - ``int8-weight-only``: one scale an output feature. No calibration.
            - ``int4-weight-only``: one scale for 128 input features, after AWQ's scaling of the inputs (Lin et al.
              2023, arXiv:2306.00978).
            - ``fp8``: weights and inputs in E4M3, one scale a tensor (Micikevicius et al. 2022, arXiv:2209.05433).
              The language-model head is included.
            - ``int8-smoothquant``: weights and inputs in int8, one scale a tensor, after SmoothQuant's scaling of the
              inputs (Xiao et al. 2022, arXiv:2211.10438).

            With the methods ``rtn`` and ``gptq`` it follows from ``bits``, and may be left out.
        method: How the weights of the linear layers are rounded: one of `METHODS`.

            - ``modelopt``: as the mode says, by NVIDIA ModelOpt.
            - ``rtn``: to the nearest integer.
            - ``gptq``: by GPTQ (Frantar et al. 2023, arXiv:2210.17323); gptq.py says how.
        bits: Of rtn and gptq: 8, 4 or 3. Three bits are stored in four. None: those of the mode.
        group_size: Of rtn and gptq in 4 or 3 bits: input features that share a scale. It has to divide the widths of
            all layers. None: an output feature has one.
        clipping: Of rtn and gptq: scales are searched for the least error of the weights; else they span the largest.
        act_order: Of gptq: columns by decreasing diagonal of the Hessian; else from left to right.
        damping: Of gptq: what is added to the Hessian's diagonal, relative to the diagonal's mean.
        kv_cache_dtype: One of `KV_CACHE_DTYPES`; "float16" leaves the cache in the model's own type. One scale for the
            keys and one for the values of each layer.
        quant_lm_head: Also quantize the weight of the language-model head and, where it is tied, the embedding.
            Weight-only, without AWQ and SmoothQuant, whose scaling of columns an embedding would have to undo.
        quant_embeddings: In int8-weight-only, also quantize the token and the position embedding, one scale a row, and
            the head. Only biases and LayerNorms are left in float32: *full int8*.
        per_channel: In int8-smoothquant, one weight scale an output feature.
        per_token: In int8-smoothquant, one input scale a token, computed as it comes.
        calib_data: A UTF-8 text file, or the name of a data set at the HuggingFace hub. None: the embedded
            checkpoint's calibration.txt.
        calib_size: How many samples, evenly spaced over the text. They overlap where the text is short.
        calib_length: Tokens of each sample. None: 256, or the whole context where that is shorter.

    Raises:
        QuantizationError: a value that is not possible; the message says what was expected and what came.
    """

    mode: str | None = None
    kv_cache_dtype: str = "float16"
    quant_lm_head: bool = False
    quant_embeddings: bool = False
    per_channel: bool = False
    per_token: bool = False
    calib_data: str | None = None
    calib_size: int = CALIB_SIZE
    calib_length: int | None = None
    method: str = "modelopt"
    bits: int | None = None
    group_size: int | None = None
    clipping: bool = True
    act_order: bool = True
    damping: float = 0.01

    def __post_init__(self) -> None:
        self._settle_method()
        if self.mode is not None and self.mode not in MODES:
            raise QuantizationError(f"expected a quantization mode of {', '.join(MODES)} but got {self.mode!r}")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            expected = ", ".join(KV_CACHE_DTYPES)
            raise QuantizationError(f"expected a KV cache dtype of {expected} but got {self.kv_cache_dtype!r}")
        if self.mode is None and self.kv_cache_dtype == "float16":
            raise QuantizationError("expected a quantization mode or a KV cache dtype other than float16 but got none")
        if self.quant_lm_head and self.mode is None:
            raise QuantizationError("expected a quantization mode with --quant-lm-head but got none")
        if self.quant_embeddings and self.mode != "int8-weight-only":
            raise QuantizationError(
                f"expected --quant-embeddings with int8-weight-only only but got it with {self.mode}"
            )
        if self.quant_embeddings and not self.quant_lm_head:
            raise QuantizationError("expected quant_embeddings with quant_lm_head only")
        for name in ("per_channel", "per_token"):
            if getattr(self, name) and self.mode != "int8-smoothquant":
                option = f"--{name.replace('_', '-')}"
                raise QuantizationError(f"expected {option} with int8-smoothquant only but got it with {self.mode}")
        for name in ("calib_size", "calib_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise QuantizationError(f"expected --{name.replace('_', '-')} to be at least 1 but got {value}")

    def _settle_method(self) -> None:
        """Checks the settings of rtn and gptq, and derives the mode from the bits or the bits from the mode."""
        if self.method not in METHODS:
            raise QuantizationError(f"expected --method to be {', '.join(METHODS)} but got {self.method!r}")
        if self.method == "modelopt":
            for name in ("bits", "group_size"):
                if getattr(self, name) is not None:
                    option = f"--{name.replace('_', '-')}"
                    raise QuantizationError(f"expected {option} with --method rtn or gptq only but got it without")
            if not self.clipping:
                raise QuantizationError("expected --no-clipping with --method rtn or gptq only but got it without")
        elif self.bits is None:
            bits = {mode: bits for bits, mode in reversed(MODE_OF_BITS.items())}
            if self.mode not in bits:
                shown = "neither" if self.mode is None else self.mode
                raise QuantizationError(
                    f"expected --bits, or a mode of {', '.join(bits)}, with --method {self.method} but got {shown}"
                )
            object.__setattr__(self, "bits", 4 if self.mode == MODE_OF_BITS[4] else 8)
        elif self.bits not in MODE_OF_BITS:
            raise QuantizationError(f"expected --bits to be {', '.join(map(str, MODE_OF_BITS))} but got {self.bits}")
        elif self.mode not in (None, MODE_OF_BITS[self.bits]):
            raise QuantizationError(
                f"expected {MODE_OF_BITS[self.bits]} with {self.bits} bits by {self.method} but got {self.mode}"
            )
        else:
            object.__setattr__(self, "mode", MODE_OF_BITS[self.bits])
        if self.method != "gptq" and not self.act_order:
            raise QuantizationError(f"expected --no-act-order with --method gptq only but got it with {self.method}")
        if self.method != "gptq" and self.damping != 0.01:
            raise QuantizationError(f"expected --damping with --method gptq only but got it with {self.method}")
        if not 0 < self.damping < math.inf:
            raise QuantizationError(f"expected --damping to be a positive number but got {self.damping}")
        if self.group_size is not None and self.group_size < 1:
            raise QuantizationError(f"expected --group-size to be at least 1 but got {self.group_size}")
        if self.group_size is not None and self.bits == 8:
            raise QuantizationError("expected --group-size with 4 or 3 bits: int8 has one scale an output feature")

    @property
    def needs_calibration(self) -> bool:
        """Whether anything depends on activations; the scales of int8 weights follow from the weights alone."""
        if self.method == "rtn":
            return self.kv_cache_dtype != "float16"
        return self.method == "gptq" or self.mode not in (None, "int8-weight-only") or self.kv_cache_dtype != "float16"

    def block(self, n_embd: int, n_inner: int) -> int:
        """Input features that share a stored scale in int4, for a model of these widths.

        Where an output feature has one scale, it is repeated: layers of all widths have the same block, as the layout
        wants it, so it is the largest that divides them all.
        """
        if self.method == "modelopt":
            return BLOCK
        return self.group_size or math.gcd(n_embd, n_inner)


# ---------------------------------------------------------------------------------------------------------------------
# Calibration text
# ---------------------------------------------------------------------------------------------------------------------

# Names that people type → (repository, configuration, column with the text). Of others the column is guessed.
HUB_DATASETS = {"cnn_dailymail": ("abisee/cnn_dailymail", "3.0.0", "article")}
_TEXT_COLUMNS = ("text", "article", "content", "document", "sentence")


def calibration_text(config: QuantizationConfig) -> tuple[str, str]:
    """The text to calibrate on, and its name for messages.

    Raises:
        QuantizationError: there is none, or it is not text.
    """
    if config.calib_data is None:
        return _read_text(CALIBRATION_TEXT), str(CALIBRATION_TEXT)
    if not _is_hub_dataset(config.calib_data):
        return _read_text(Path(config.calib_data).expanduser()), config.calib_data
    return _download_text(config.calib_data, config.calib_size), f"data set {config.calib_data}"


def _is_hub_dataset(name: str) -> bool:
    """Whether a --calib-data is the name of a data set: `name` or `organization/name`, and no such file."""
    is_path = name == "" or name[0] in "./~" or name[-1] == "/" or name.count("/") > 1 or "\\" in name
    return not (is_path or os.path.exists(name) or Path(name).suffix.lower() in (".txt", ".md", ".text"))


def _read_text(path: Path) -> str:
    try:
        text = text_file.read_text(path)
    except UsageError as error:
        raise QuantizationError(str(error)) from None
    if not text.strip():
        raise QuantizationError(f"expected text to calibrate on but {path} is empty")
    return text


def _download_text(name: str, documents: int) -> str:
    """The first documents of a data set's training split, with an empty line between them."""
    repository, configuration, column = HUB_DATASETS.get(name, (name, None, None))
    try:
        import datasets
    except ImportError:
        raise QuantizationError(
            f"there is no file {name!r}, and the data set of that name needs: pip install datasets"
        ) from None
    try:
        with quiet():
            split = datasets.load_dataset(repository, configuration, split="train", streaming=True)
            rows = list(split.take(documents))
    except Exception as error:  # no network, no such data set, or whatever its loader raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise QuantizationError(
            f"there is no file {name!r}, and the data set cannot be loaded from the hub: {reason[:200]}"
        ) from None
    known = [c for c in (column, *_TEXT_COLUMNS) if c is not None and rows and isinstance(rows[0].get(c), str)]
    if not known:
        columns = ", ".join(rows[0]) if rows else "none"
        raise QuantizationError(f"expected a column of text in the data set {name!r} but its columns are: {columns}")
    return "\n\n".join(str(row[known[0]]) for row in rows)


def calibration_samples(checkpoint: Checkpoint, config: QuantizationConfig) -> np.ndarray:
    """Token ids, (samples, tokens) int64: windows of the text at even distances, the first at its start.

    Raises:
        QuantizationError: there is no text, or it is too short for one sample.
        CheckpointError: the checkpoint's tokenizer cannot be used.
    """
    from tokenizer import UnknownCharacterError, load_tokenizer

    context = checkpoint.config.n_positions
    length = min(CALIB_LENGTH, context) if config.calib_length is None else config.calib_length
    if length > context:
        raise QuantizationError(f"expected --calib-length to be at most the context of {context} but got {length}")
    text, source = calibration_text(config)
    try:
        ids = np.array(load_tokenizer(checkpoint.path, checkpoint.config.vocab_size).encode(text), dtype=np.int64)
    except UnknownCharacterError as error:
        raise QuantizationError(f"cannot calibrate on {source}: {error}; name a text with --calib-data") from None
    if len(ids) < length:
        raise QuantizationError(
            f"expected at least {length} tokens to calibrate on (one sample) but {source} has {len(ids)}"
        )
    last = len(ids) - length
    size = min(config.calib_size, last + 1)  # more samples would be the same ones again
    starts = sorted({last * sample // max(size - 1, 1) for sample in range(size)})
    return np.stack([ids[start : start + length] for start in starts])


# ---------------------------------------------------------------------------------------------------------------------
# Quantization
# ---------------------------------------------------------------------------------------------------------------------

_INT8 = {"num_bits": 8, "axis": None}  # one scale a tensor
_INT8_ROWS = {"num_bits": 8, "axis": 0}  # one a row: an output feature of a linear layer, a token of an embedding
_INT8_TOKENS = {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}}  # one a token, computed as it comes
_FP8 = {"num_bits": (4, 3), "axis": None}

_PRESETS = {
    "int8-weight-only": "INT8_WEIGHT_ONLY_CFG",
    "int4-weight-only": "INT4_AWQ_CFG",
    "fp8": "FP8_DEFAULT_CFG",
    "int8-smoothquant": "INT8_SMOOTHQUANT_CFG",
}


def _head_weight(mode: str, block: int) -> dict[str, Any]:
    """ModelOpt's description of how the head's weight is quantized in each mode."""
    return {
        "int8-weight-only": _INT8_ROWS,
        "int4-weight-only": _int4_blocks(block),
        "fp8": _FP8,
        "int8-smoothquant": _INT8_ROWS,
    }[mode]


def _int4_blocks(block: int) -> dict[str, Any]:
    return {"num_bits": 4, "block_sizes": {-1: block, "type": "static"}}


def modelopt_config(config: QuantizationConfig, block: int = BLOCK) -> dict[str, Any]:
    """What `modelopt.torch.quantization.quantize` is given: ModelOpt's preset of the mode and our changes to it."""
    import modelopt.torch.quantization as mtq

    if config.mode is None:
        preset: dict[str, Any] = {"quant_cfg": [{"quantizer_name": "*", "enable": False}], "algorithm": "max"}
    else:
        preset = copy.deepcopy(dict(getattr(mtq, _PRESETS[config.mode])))
    entries = [
        *preset["quant_cfg"],
        # ModelOpt 0.47's W8A8 presets also quantize what enters a LayerNorm. No engine does, and the export drops it.
        {"quantizer_name": "*", "parent_class": "nn.LayerNorm", "enable": False},
    ]
    if config.mode == "int4-weight-only" and config.method != "modelopt":
        preset["algorithm"] = "max"  # not AWQ: the weights are on their grids already
        entries.append({"quantizer_name": "*.h.*weight_quantizer", "cfg": _int4_blocks(block)})
    if config.mode == "fp8":
        entries += [{"quantizer_name": f"*lm_head.{which}_quantizer", "cfg": _FP8} for which in ("weight", "input")]
    if config.mode == "int8-smoothquant":
        preset["algorithm"] = {"method": "smoothquant", "alpha": SMOOTHQUANT_ALPHA}
        if not config.per_channel:
            entries.append({"quantizer_name": "*.h.*weight_quantizer", "cfg": _INT8})
    if config.kv_cache_dtype != "float16":
        cache = _INT8 if config.kv_cache_dtype == "int8" else _FP8
        entries.append({"quantizer_name": "*[kv]_bmm_quantizer", "cfg": cache})
    return {**preset, "quant_cfg": entries}


def load_torch_model(folder: Path) -> Any:
    """transformers' GPT2LMHeadModel of a checkpoint folder, in float32, ready to be quantized.

    Raises:
        QuantizationError: transformers does not load it, or not all of it.
    """
    import torch
    import transformers

    # Attention in plain operations: what is observed then does not depend on which fused kernel a processor has.
    try:
        with quiet(), _no_progress_bars():
            model, found = transformers.GPT2LMHeadModel.from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation="eager",
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # transformers, safetensors and torch each raise their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise QuantizationError(f"transformers cannot open {folder}: {reason}") from None
    if found["missing_keys"]:  # it would make them up
        raise QuantizationError(f"expected {sorted(found['missing_keys'])[0]} in {folder} but it is not there")
    model.config.architectures = ["GPT2LMHeadModel"]  # the exporter reads it, and old checkpoints lack it
    model.generation_config = transformers.GenerationConfig()  # the exporter refuses some that others wrote
    return model.eval()


def quantize_model(model: Any, config: QuantizationConfig, samples: np.ndarray | None) -> None:
    """Calibrates a GPT2LMHeadModel: from here on it computes as if it were quantized.

    It is the reference for every other implementation: weights, inputs and the KV cache are rounded to what the
    quantized types can hold and computed with in float32. Its linear layers, transformers' Conv1D, become Linear with
    the transposed weight.

    Args:
        model: Changed in place.
        samples: Token ids, (samples, tokens). May be None where `config.needs_calibration` is false.

    Raises:
        QuantizationError: the weights or the activations are not numbers that can be quantized.
    """
    import modelopt.torch.quantization as mtq
    import torch

    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise QuantizationError(f"expected finite weights but {name} holds infinities or NaNs")
    block = _block(model, config)
    if config.quant_lm_head and model.config.tie_word_embeddings:
        # Of the same values still, but each with its own quantizer.
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    smooths = config.mode == "int8-smoothquant"
    try:
        with quiet(), torch.no_grad():
            observe = _forward_loop(config, samples) if config.needs_calibration and samples is not None else None
            layers = [] if config.method == "modelopt" else _round_layers(model, config, samples)
            with _without_zero_features(model) if smooths else contextlib.nullcontext():
                mtq.quantize(model, modelopt_config(config, block), observe)
            for layer in layers:
                _set_scales(model.transformer.get_submodule(layer.name), layer.scales, block)
            if config.per_token:
                _make_inputs_dynamic(model)
            if config.quant_lm_head and config.mode is not None:
                _quantize_head(model, config, block)
    except (AssertionError, LookupError, RuntimeError, ValueError) as error:  # infinities and NaNs; no memory; …
        # ModelOpt and torch each raise their own.
        reason = str(error).strip() or type(error).__name__
        raise QuantizationError(f"ModelOpt cannot calibrate this checkpoint: {reason.splitlines()[0]}") from error


@contextlib.contextmanager
def _without_zero_features(model: Any) -> Iterator[None]:
    """While ModelOpt smooths, no input feature's weights are all zero, as a pruned model's are: it ends there.

    Any scale will do. One weight of theirs is made just large enough to have one, and put back (smoothed) in the end.
    """
    kept = []
    for name, module in model.transformer.h.named_modules():
        if name.endswith(("c_attn", "c_proj", "c_fc")):
            weight = module.weight  # a Conv1D's, (in, out)
            largest = weight.abs().amax(dim=1)
            least = (float(largest.max()) or 1.0) * 1e-9
            features = (largest < least).nonzero()[:, 0]
            kept.append((name, features, weight[features].clone()))
            weight[features, 0] = least
    yield
    for name, features, rows in kept:
        module = model.transformer.h.get_submodule(name)  # a Linear's weight by now, (out, in)
        if len(features):
            scale = module.input_quantizer.pre_quant_scale.reshape(-1)[features]
            module.weight[:, features] = (rows / scale[:, None]).T


def _block(model: Any, config: QuantizationConfig) -> int:
    return config.block(model.config.n_embd, model.config.n_inner or 4 * model.config.n_embd)


def _grid(config: QuantizationConfig) -> gptq.Grid:
    import gptq

    assert config.bits is not None
    return gptq.Grid(config.bits, config.group_size, config.clipping)


def _round_layers(model: Any, config: QuantizationConfig, samples: np.ndarray | None) -> list[gptq.QuantizedLayer]:
    """Rounds the weights of the linear layers in place, by rtn or gptq."""
    import torch

    import gptq

    batches = None
    if config.method == "gptq":
        assert samples is not None
        count = max(1, CALIB_BATCH_TOKENS // samples.shape[1])
        batches = [torch.from_numpy(samples[begin : begin + count]) for begin in range(0, len(samples), count)]
    try:
        return gptq.quantize_layers(model, _grid(config), batches, act_order=config.act_order, damping=config.damping)
    except gptq.GPTQError as error:
        raise QuantizationError(str(error)) from None


def _set_scales(module: Any, scales: Any, block: int) -> None:
    """Gives ModelOpt's quantizer of a weight that is on its grid the grid's scales, (out, groups).

    Its scale is `amax` over the largest integer of its type: 127 in int8, 7 in int4, of three bits too.
    """
    quantizer = module.weight_quantizer
    if quantizer.num_bits == 4:
        scales = scales.repeat_interleave(module.weight.shape[1] // block // scales.shape[1], dim=1)
    quantizer.amax = (scales * quantizer.maxbound).reshape(quantizer.amax.shape)


def _forward_loop(config: QuantizationConfig, samples: np.ndarray) -> Callable[[Any], None]:
    """What ModelOpt calls to see activations: once to observe, and for AWQ once more to search."""
    import torch
    from tqdm import tqdm

    # ModelOpt looks at every weight again in every call, and AWQ quantizes it eleven times: that has to be shared.
    batch = max(1, CALIB_BATCH_TOKENS // samples.shape[1])
    passes = 0

    def run(model: Any) -> None:
        nonlocal passes
        passes += 1
        network = model if config.mode == "fp8" else model.transformer  # of the others, none looks at the head's input
        with tqdm(desc=f"calibration, pass {passes}", total=len(samples), unit="sample", file=sys.stderr) as progress:
            for begin in range(0, len(samples), batch):
                part = samples[begin : begin + batch]
                network(torch.from_numpy(part), use_cache=False)
                progress.update(len(part))

    return run


def _make_inputs_dynamic(model: Any) -> None:
    """Replaces the calibrated input scales by one a token. Smoothing has to be over: it needs the calibrated ones."""
    import modelopt.torch.quantization as mtq

    for name, module in model.named_modules():
        if name.endswith("input_quantizer") and module.is_enabled:
            module.reset_amax()
            mtq.set_quantizer_by_cfg(model, [{"quantizer_name": name, "cfg": _INT8_TOKENS}])


def _quantize_head(model: Any, config: QuantizationConfig, block: int) -> None:
    """Quantizes the head's weight and, in the same way, those of the embeddings: of the tied one, or of both.

    By rounding to nearest also in gptq: an embedding gives single rows, which nothing can make up for.
    """
    import modelopt.torch.quantization as mtq

    assert config.mode is not None
    modules = {"lm_head": model.lm_head}
    if model.config.tie_word_embeddings or config.quant_embeddings:
        modules["transformer.wte"] = model.transformer.wte
    if config.quant_embeddings:
        modules["transformer.wpe"] = model.transformer.wpe
    for name, module in modules.items():
        entry = {"quantizer_name": f"{name}.weight_quantizer", "cfg": _head_weight(config.mode, block)}
        mtq.set_quantizer_by_cfg(model, [entry])
        mtq.calibrate(module, "max")
        if config.method != "modelopt":
            import gptq

            layer = gptq.quantize(module.weight, None, _grid(config), name=name)
            module.weight.copy_(layer.weight)
            _set_scales(module, layer.scales, block)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what ModelOpt and transformers print, warn and log off the terminal: our own progress bar says enough."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


# ---------------------------------------------------------------------------------------------------------------------
# Export
# ---------------------------------------------------------------------------------------------------------------------


def export(model: Any, folder: Path, config: QuantizationConfig) -> None:
    """Writes a model that `quantize_model` has calibrated, in ModelOpt's unified HuggingFace layout. It is spent then.

    ModelOpt's exporter does it, with two additions for what it refuses: a weight of an odd number of rows in int4 gets
    one more row, of zeros, since the exporter packs rows in pairs; and the scales of an int8 KV cache, which it knows
    but does not write, are written as those of an fp8 cache are, with 127 for 448.
    """
    import torch
    from modelopt.torch.export import export_hf_checkpoint

    extra: dict[str, Any] = {}
    with quiet(), _no_progress_bars(), torch.no_grad():
        if config.mode == "int4-weight-only":
            _make_rows_even(model, _block(model, config))
        _give_zeros_a_scale(model)
        if config.kv_cache_dtype == "int8":
            extra = _take_cache_scales(model)
        # float32, so that the stored integers are those that the calibrated model computes with.
        export_hf_checkpoint(model, dtype=torch.float32, export_dir=folder, extra_state_dict=extra)
        if extra:
            _declare_int8_cache(model, folder)
        if config.method != "modelopt":
            _declare_method(folder, config)


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


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


# ---------------------------------------------------------------------------------------------------------------------
# From folder to folder
# ---------------------------------------------------------------------------------------------------------------------


def quantize_checkpoint(checkpoint: Checkpoint, config: QuantizationConfig, folder: Path) -> None:
    """Loads a checkpoint, calibrates it, and writes the quantized one to `folder`, all of it or nothing.

    Args:
        folder: Must not exist, or be empty.

    Raises:
        QuantizationError: it cannot be quantized as asked, or `folder` cannot be written; told before any long work
            where that is possible.
        CheckpointError: the checkpoint or its tokenizer cannot be used.
    """
    _check_source(checkpoint, config)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise QuantizationError(f"expected {folder} not to exist but it does")
    samples = calibration_samples(checkpoint, config) if config.needs_calibration else None
    _require_modelopt()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise QuantizationError(f"cannot write {folder}: {error.strerror}") from None
    try:
        model = load_torch_model(checkpoint.path)
        quantize_model(model, config, samples)
        _export_or_say_why(model, partial, config)
        (partial / GENERATION_FILE).unlink(missing_ok=True)  # transformers' idea of it: the checkpoint's own counts
        for file in (*TOKENIZER_FILES, GENERATION_FILE):
            if (checkpoint.path / file).is_file():
                shutil.copyfile(checkpoint.path / file, partial / file)
        for path in (partial, *partial.iterdir()):  # mkdtemp and safetensors make them for their owner alone
            path.chmod(0o755 if path.is_dir() else 0o644)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise QuantizationError(f"cannot write {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _export_or_say_why(model: Any, folder: Path, config: QuantizationConfig) -> None:
    """`export`, whose libraries each have their own exceptions, for a full disk too.

    Raises:
        OSError: the files cannot be written.
    """
    from safetensors import SafetensorError

    try:
        export(model, folder, config)
    except (SafetensorError, AssertionError, LookupError, RuntimeError, ValueError) as error:
        raise OSError((str(error).strip() or type(error).__name__).splitlines()[0]) from error


def _check_source(checkpoint: Checkpoint, config: QuantizationConfig) -> None:
    """Refuses what cannot be quantized as asked, from its config alone."""
    if checkpoint.config.quant_mode is not None or checkpoint.config.kv_cache_dtype is not None:
        raise QuantizationError(f"expected a checkpoint that is not quantized yet but {checkpoint.path} is")
    if config.mode == "int4-weight-only":
        widths = checkpoint.config.n_embd, checkpoint.config.n_inner
        block = config.block(*widths)
        for name, layer, width in zip(
            ("n_embd", "n_inner"), ("h.0.attn.c_attn", "h.0.mlp.c_proj"), widths, strict=True
        ):
            if width % block and config.method == "modelopt":
                raise QuantizationError(
                    f"expected {name} to be a multiple of the int4 block of {block} but got {width}"
                )
            if width % block:
                raise QuantizationError(
                    f"expected --group-size to divide the {width} input features of {layer} but got {block}"
                )


def _require_modelopt() -> None:
    try:
        with quiet():  # ModelOpt warns of every transformers that is newer than itself
            for name in ("torch", "transformers", "tqdm", "modelopt.torch.quantization"):
                importlib.import_module(name)
    except ImportError as error:
        raise QuantizationError(
            f"quantizing needs the packages of {REQUIREMENTS.name} ({error}): pip install -r {REQUIREMENTS.name}"
        ) from None


# ---------------------------------------------------------------------------------------------------------------------
# The cache: quantize once, run often
# ---------------------------------------------------------------------------------------------------------------------


def default_cache() -> Path:
    """The user's cache folder for quantized checkpoints."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return Path(os.path.expanduser(base)) / "nanogpt-tripy" / "quantized"


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
    _check_source(checkpoint, config)
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
    add(_read_bytes(REQUIREMENTS))  # ModelOpt's version, without importing it
    for source in (Path(__file__), *([ROOT / "gptq.py"] if config.method != "modelopt" else [])):
        add(_read_bytes(source))
    add(repr(checkpoint.config.eos_token_ids).encode())
    for file in (*TOKENIZER_FILES, GENERATION_FILE):
        if (checkpoint.path / file).is_file():
            add(file.encode())
            add(_read_bytes(checkpoint.path / file))
    if config.needs_calibration:
        data = config.calib_data
        is_file = data is None or not _is_hub_dataset(data)
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


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise QuantizationError(f"cannot read {path}: {error.strerror}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """The options that say how to quantize, for every program that takes them."""
    parser.add_argument("--quant-mode", metavar="MODE", help=f"quantize the weights: {', '.join(MODES)}")
    parser.add_argument(
        "--method", metavar="NAME", default="modelopt", help=f"of rounding: {', '.join(METHODS)} (default %(default)s)"
    )
    parser.add_argument("--bits", metavar="N", type=int, help="rtn, gptq: 8, 4 or 3 (default: the mode's)")
    parser.add_argument(
        "--group-size", metavar="N", type=int, help="rtn, gptq: input features a scale (default: one an output feature)"
    )
    parser.add_argument(
        "--no-clipping", dest="clipping", action="store_false", help="rtn, gptq: scales that span the largest weight"
    )
    parser.add_argument(
        "--no-act-order", dest="act_order", action="store_false", help="gptq: round columns from left to right"
    )
    parser.add_argument(
        "--damping", metavar="X", type=float, default=0.01, help="gptq: of the Hessian (default %(default)s)"
    )
    parser.add_argument(
        "--kv-cache-dtype", metavar="DTYPE", default="float16", help=f"{', '.join(KV_CACHE_DTYPES)} (default float16)"
    )
    parser.add_argument("--quant-lm-head", action="store_true", help="quantize the head and the tied embedding, too")
    parser.add_argument(
        "--quant-embeddings", action="store_true", help="int8-weight-only: quantize both embeddings and the head, too"
    )
    parser.add_argument("--per-channel", action="store_true", help="int8-smoothquant: a scale an output feature")
    parser.add_argument("--per-token", action="store_true", help="int8-smoothquant: a scale an input token")
    parser.add_argument(
        "--calib-data",
        metavar="FILE|DATASET",
        help="a UTF-8 text, or a data set at the hub such as cnn_dailymail (default: checkpoints/shakespeare's)",
    )
    parser.add_argument("--calib-size", metavar="N", type=int, default=CALIB_SIZE, help="samples (default %(default)s)")
    parser.add_argument(
        "--calib-length", metavar="N", type=int, help=f"tokens a sample (default {CALIB_LENGTH}, or the context)"
    )


def is_asked_for(options: argparse.Namespace) -> bool:
    """Whether any of `add_arguments`' options was given."""
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    return any(getattr(options, name) != default for name, default in vars(parser.parse_args([])).items())


def config_from(options: argparse.Namespace) -> QuantizationConfig:
    """The settings that `add_arguments`' options give.

    Raises:
        QuantizationError: they are not possible.
    """
    return QuantizationConfig(
        mode=options.quant_mode,
        kv_cache_dtype=options.kv_cache_dtype,
        quant_lm_head=options.quant_lm_head or options.quant_embeddings,
        quant_embeddings=options.quant_embeddings,
        per_channel=options.per_channel,
        per_token=options.per_token,
        calib_data=options.calib_data,
        calib_size=options.calib_size,
        calib_length=options.calib_length,
        method=options.method,
        bits=options.bits,
        group_size=options.group_size,
        clipping=options.clipping,
        act_order=options.act_order,
        damping=options.damping,
    )


def run(arguments: Sequence[str] | None = None) -> None:
    """Carries out the command."""
    parser = command_line.Parser("quantization.py", "Quantize a GPT-2.")
    command_line.add_model_arguments(parser)
    parser.add_argument("--output", metavar="DIR", type=command_line.path, help="the folder to write")
    parser.add_argument(
        "--show-stats",
        action="store_true",
        help="print what each part of the written folder takes or, without --output, of the given checkpoint",
    )
    add_arguments(parser)
    options = parser.parse_args(arguments)
    if options.output is None and (not options.show_stats or is_asked_for(options)):
        raise command_line.UsageError("expected --output DIR, the folder to write, but got none")
    checkpoint = open_checkpoint(options.model_type, options.revision)
    if options.output is not None:
        config = config_from(options)
        quantize_checkpoint(checkpoint, config, options.output)
        sizes = _megabytes(options.output.glob("*.safetensors"))
        command_line.report(f"wrote {options.output}: {', '.join(_kinds(config))}, {sizes:.1f} MB")
        checkpoint = open_checkpoint(options.output)
    if options.show_stats:
        print(compression.table(checkpoint))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after one line on standard error for input that cannot be used."""
    return command_line.main("quantization.py", lambda: run(arguments), QuantizationError, CheckpointError)


def _kinds(config: QuantizationConfig) -> list[str]:
    cache = [] if config.kv_cache_dtype == "float16" else [f"KV cache in {config.kv_cache_dtype}"]
    rounding = [] if config.method == "modelopt" else [f"{config.bits} bits by {config.method}"]
    return [*([config.mode] if config.mode else []), *rounding, *cache]


def _megabytes(paths: Iterable[Path]) -> float:
    return sum(path.stat().st_size for path in paths) / 1e6


if __name__ == "__main__":
    sys.exit(main())

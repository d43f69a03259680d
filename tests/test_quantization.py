"""quantization.py: ModelOpt's arithmetic, the folder that is written, the cache, and what bad input is told.

Two independent implementations stand against ModelOpt here. `int_fake_quantize` and `fp8_fake_quantize` are its
rounding in NumPy, equal bit for bit. `reader` computes with nothing but the files of a quantized folder, in plain
transformers, and so says how the folder has to be read: its logits are those of ModelOpt's calibrated model.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import resource
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from selection import partly_slow
from tiny_checkpoints import CONTEXT, VOCABULARY, edit_config, random_checkpoint

import quantization
import quantizing.cache
import quantizing.calibration
import quantizing.export
import quantizing.folders
import quantizing.settings
import quantizing.text
import quantizing.torch_model
from command_line import EMBEDDED_CHECKPOINT
from quantization import QuantizationConfig, QuantizationError
from weight_loader import Checkpoint, CheckpointError, open_checkpoint

ROOT = Path(__file__).resolve().parents[1]
WIDTH, LAYERS = 128, 2
LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer. " * 20


@pytest.fixture
def modelopt() -> None:
    pytest.importorskip("modelopt.torch.quantization", reason="quantizing needs requirements/quant.txt")


def make_checkpoint(
    folder: Path,
    tied: bool = True,
    vocabulary: int = VOCABULARY,
    width: int = WIDTH,
    inner: int | None = None,
    heads: int = 2,
) -> Checkpoint:
    """A random GPT-2 whose input channels differ in size, so that smoothing has something to do."""
    random_checkpoint(folder)  # for its tokenizer
    edit_config(folder, n_embd=width, n_layer=LAYERS, vocab_size=vocabulary, tie_word_embeddings=tied)
    edit_config(folder, n_inner=inner, n_head=heads)
    inner = inner or 4 * width
    random = np.random.default_rng(0)

    def normal(*shape: int, scale: float) -> np.ndarray:
        return (random.normal(size=shape) * scale).astype(np.float32)

    tensors = {
        "transformer.wte.weight": normal(vocabulary, width, scale=0.5),
        "transformer.wpe.weight": normal(CONTEXT, width, scale=0.5),
        "transformer.ln_f.weight": 1 + normal(width, scale=0.1),
        "transformer.ln_f.bias": normal(width, scale=0.1),
    }
    for layer in range(LAYERS):
        block = f"transformer.h.{layer}"
        for name, size_in, size_out in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, inner),
            ("mlp.c_proj", inner, width),
        ):
            tensors[f"{block}.{name}.weight"] = normal(size_in, size_out, scale=0.5 * size_in**-0.5)
            tensors[f"{block}.{name}.bias"] = normal(size_out, scale=0.1)
        for name in ("ln_1", "ln_2"):
            tensors[f"{block}.{name}.weight"] = np.exp(normal(width, scale=0.7))
            tensors[f"{block}.{name}.bias"] = normal(width, scale=0.1)
    if not tied:
        tensors["lm_head.weight"] = normal(vocabulary, width, scale=0.1)
    save_file(tensors, folder / "model.safetensors")
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture
def config(text_file: Path) -> Callable[..., QuantizationConfig]:
    def make(mode: str | None = None, **settings: Any) -> QuantizationConfig:
        return QuantizationConfig(mode, **{"calib_data": str(text_file), "calib_size": 4, **settings})

    return make


# ---------------------------------------------------------------------------------------------------------------------
# ModelOpt's arithmetic
# ---------------------------------------------------------------------------------------------------------------------

SMALLEST_AMAX = np.float32(2.0**-24)  # of what is smaller ModelOpt makes zeros


def int_fake_quantize(x: np.ndarray, amax: np.ndarray, bits: int = 8) -> np.ndarray:
    """What an integer quantizer makes of float32 `x`, given the largest magnitude, which broadcasts against it.

    Integers from -2^(bits-1) to 2^(bits-1) - 1, of which the last stands for `amax`; halves are rounded to even.
    """
    top = np.float32(2 ** (bits - 1) - 1)
    is_zero = amax <= SMALLEST_AMAX
    with np.errstate(divide="ignore"):
        scale = np.where(is_zero, np.float32(0), top / amax)
    integers = np.clip(np.rint(x * scale), -top - 1, top)
    return integers / np.where(is_zero, np.float32(1), scale)


def fp8_fake_quantize(x: np.ndarray, amax: np.ndarray) -> np.ndarray:
    """What an E4M3 quantizer makes of float32 `x`. 448, the largest E4M3 number, stands for `amax`."""
    reciprocal = np.float32(1) / np.where(amax <= SMALLEST_AMAX, np.float32(1), amax)
    scale = reciprocal * np.float32(448)  # in this order: it is how torch divides a number by a tensor
    rounded = np.clip(x * scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return rounded * (np.float32(1) / scale)


def block_fake_quantize(x: np.ndarray) -> np.ndarray:
    blocks = x.reshape(-1, quantizing.settings.BLOCK)
    return int_fake_quantize(blocks, np.abs(blocks).max(axis=1, keepdims=True), bits=4).reshape(x.shape)


FORMULAS: dict[str, tuple[dict[str, Any], Callable[[np.ndarray], np.ndarray]]] = {
    "int8": ({"num_bits": 8}, lambda x: int_fake_quantize(x, np.abs(x).max())),
    "int8 rows": ({"num_bits": 8, "axis": 0}, lambda x: int_fake_quantize(x, np.abs(x).max(axis=1, keepdims=True))),
    "int8 tokens": (
        {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}},
        lambda x: int_fake_quantize(x, np.abs(x).max(axis=-1, keepdims=True)),
    ),
    "int4 blocks": ({"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}}, block_fake_quantize),
    "fp8": ({"num_bits": (4, 3)}, lambda x: fp8_fake_quantize(x, np.abs(x).max())),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("seed", range(8))
def test_formula_is_modelopts_bit_for_bit(modelopt: None, name: str, seed: int) -> None:
    import torch
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    attributes, formula = FORMULAS[name]
    random = np.random.default_rng(seed)
    x = (random.normal(size=(48, 256)) * random.choice([1e-9, 1e-3, 1, 50], size=(48, 1))).astype(np.float32)
    x[3], x[4, 1:] = 0, 0
    tensor = torch.from_numpy(x)
    quantizer = TensorQuantizer(QuantizerAttributeConfig(**attributes))
    if attributes.get("type") != "dynamic":
        quantizer.disable_quant()
        quantizer.enable_calib()
        quantizer(tensor)
        quantizer.load_calib_amax()
        quantizer.disable_calib()
        quantizer.enable_quant()
    np.testing.assert_array_equal(quantizer(tensor).numpy(), formula(x))


@pytest.mark.parametrize("bits", [8, (4, 3)])
def test_what_exceeds_the_calibrated_range_is_clipped(modelopt: None, bits: int | tuple[int, int]) -> None:
    import torch
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    x = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    x[0, :2] = 10, -10
    quantizer = TensorQuantizer(QuantizerAttributeConfig(num_bits=bits))
    quantizer.amax = torch.tensor(0.7)
    formula = int_fake_quantize if bits == 8 else fp8_fake_quantize
    result = quantizer(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(result, formula(x, np.array(0.7, np.float32)))
    # The negative end of the integers has one step more.
    assert result[0] == pytest.approx([0.7, -0.7 * (128 / 127 if bits == 8 else 1), *result[0, 2:]])


# ---------------------------------------------------------------------------------------------------------------------
# The folder
# ---------------------------------------------------------------------------------------------------------------------


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder, without the prefix that transformers' names have; fp8 as ml_dtypes' float8_e4m3fn."""
    import torch

    tensors = {}
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118  it is not a dict
            tensor = file.get_tensor(name)
            if tensor.dtype == torch.float8_e4m3fn:
                array = tensor.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
            else:
                array = tensor.numpy()
            tensors[name.removeprefix("transformer.")] = array
    return tensors


def unpack_int4(packed: np.ndarray) -> np.ndarray:
    """Bytes (rows / 2, columns), the even row in the low half → integers from -8 to 7, (rows, columns) int8."""
    halves = np.stack([packed << 4, packed], axis=1).view(np.int8) >> 4
    return halves.reshape(-1, packed.shape[1])


def dequantize(tensors: dict[str, np.ndarray], layer: str) -> np.ndarray:
    """A weight in float32, (out features, in features); a scale of 1 to 2 dimensions or none says how it was stored."""
    weight, scale = tensors[f"{layer}.weight"], tensors.get(f"{layer}.weight_scale")
    if scale is None:
        return weight
    if weight.dtype == np.uint8:
        weight = unpack_int4(weight)
        scale = np.repeat(scale, weight.shape[1] // scale.shape[1], axis=1)
    elif scale.ndim == 1:
        scale = scale[:, None]
    return weight.astype(np.float32) * scale


def reader(folder: Path) -> Any:
    """A GPT2LMHeadModel that computes what a quantized folder says, from its files alone."""
    import torch
    import transformers
    from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward

    tensors = read_tensors(folder)
    settings = json.loads((folder / "config.json").read_text())
    how = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    del settings["quantization_config"]
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**settings, "tie_word_embeddings": False})).eval()
    rows = settings["vocab_size"]

    def fake_quantize(x: Any, scale: np.ndarray | None, kind: str | None) -> Any:
        """By the stored scale, or one a token."""
        array = x.detach().numpy()
        if kind == "FP8":
            return torch.from_numpy(fp8_fake_quantize(array, scale * np.float32(448)))
        amax = np.abs(array).max(axis=-1, keepdims=True) if scale is None else scale * np.float32(127)
        return torch.from_numpy(int_fake_quantize(array, amax))

    def attach(layer: str, module: Any, kind: str | None) -> None:
        pre_quant_scale, input_scale = tensors.get(f"{layer}.pre_quant_scale"), tensors.get(f"{layer}.input_scale")

        def before(module: Any, inputs: tuple[Any]) -> tuple[Any]:
            x = inputs[0]
            if pre_quant_scale is not None:
                x = x * torch.from_numpy(pre_quant_scale)
            if kind == "FP8" or kind == "W8A8_SQ_PER_CHANNEL":
                x = fake_quantize(x, input_scale, kind)
            return (x,)

        module.register_forward_pre_hook(before)

    def kind_of(layer: str) -> str | None:
        if how["quant_algo"] == "MIXED_PRECISION":
            return how["quantized_layers"].get(f"transformer.{layer}", {}).get("quant_algo")
        return how["quant_algo"]

    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            name = name.removeprefix("transformer.")
            layer, _, last = name.rpartition(".")
            if last == "weight" and (layer.endswith(LINEARS) or layer in ("wte", "wpe", "lm_head")):
                source = layer if f"{name}" in tensors else "wte"
                value = dequantize(tensors, source)
                if layer.endswith(LINEARS):
                    value = value.T  # (out, in), as Linear has it: the exported model has no Conv1D any more
                    attach(layer, model.transformer.get_submodule(layer), kind_of(layer))
                elif layer != "wpe":
                    value = value[:rows]
            else:
                value = tensors[name]
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(value)))
        if "lm_head.input_scale" in tensors:
            attach("lm_head", model.lm_head, "FP8")

    def attention(module: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        kind = how["kv_cache_quant_algo"]
        if kind is not None:
            layer = f"h.{module.layer_idx}.attn"
            k = fake_quantize(k, tensors[f"{layer}.k_proj.k_scale"], kind)
            v = fake_quantize(v, tensors[f"{layer}.v_proj.v_scale"], kind)
        return eager_attention_forward(module, q, k, v, *args, **kwargs)

    transformers.AttentionInterface.register("quantized_folder", attention)
    transformers.masking_utils.AttentionMaskInterface.register(
        "quantized_folder", transformers.masking_utils.eager_mask
    )
    model.set_attn_implementation("quantized_folder")
    return model


def logits(model: Any) -> np.ndarray:
    import torch

    ids = torch.from_numpy(np.random.default_rng(1).integers(0, VOCABULARY - 1, (2, CONTEXT)))
    with torch.no_grad():
        return model(ids, use_cache=False).logits.numpy()


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


CASES: dict[str, dict[str, Any]] = {
    "int8-weight-only": {"mode": "int8-weight-only"},
    "int8-weight-only, head": {"mode": "int8-weight-only", "quant_lm_head": True},
    "int8-weight-only, embeddings": {"mode": "int8-weight-only", "quant_lm_head": True, "quant_embeddings": True},
    "int4-weight-only": {"mode": "int4-weight-only"},
    "int4-weight-only, head": {"mode": "int4-weight-only", "quant_lm_head": True},
    "fp8": {"mode": "fp8"},
    "fp8, head": {"mode": "fp8", "quant_lm_head": True},
    "int8-smoothquant": {"mode": "int8-smoothquant"},
    "int8-smoothquant, per channel": {"mode": "int8-smoothquant", "per_channel": True},
    "int8-smoothquant, per token": {"mode": "int8-smoothquant", "per_token": True},
    "int8-smoothquant, per both": {"mode": "int8-smoothquant", "per_channel": True, "per_token": True},
    "int8-smoothquant, head": {"mode": "int8-smoothquant", "quant_lm_head": True},
    "fp8 cache": {"kv_cache_dtype": "fp8"},
    "int8 cache": {"kv_cache_dtype": "int8"},
    "fp8, int8 cache": {"mode": "fp8", "kv_cache_dtype": "int8"},
    "int4-weight-only, fp8 cache": {"mode": "int4-weight-only", "kv_cache_dtype": "fp8"},
}
QUICK = ("int8-weight-only, embeddings", "int4-weight-only, head", "fp8", "int8-smoothquant, per both", "int8 cache")


@dataclasses.dataclass
class Result:
    folder: Path
    logits: np.ndarray  # of ModelOpt's calibrated model
    error: float  # of quantization itself: how far they are from the float model's


@pytest.fixture(scope="module")
def results(tiny: Checkpoint, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Result]:
    """Quantizes each case once."""
    made: dict[str, Result] = {}

    def get(case: str) -> Result:
        if case not in made:
            folder = tmp_path_factory.mktemp("quantized") / "folder"
            settings = QuantizationConfig(**CASES[case], calib_data=str(text_file), calib_size=4)
            quantization.quantize_checkpoint(tiny, settings, folder)
            model = quantizing.torch_model.load_torch_model(tiny.path)
            before = logits(model)
            quantizing.calibration.quantize_model(model, settings, quantizing.text.calibration_samples(tiny, settings))
            made[case] = Result(folder, logits(model), relative_error(logits(model), before))
        return made[case]

    return get


@pytest.mark.parametrize("case", partly_slow(CASES, QUICK))
def test_the_files_alone_give_modelopts_logits(modelopt: None, results: Callable[[str], Result], case: str) -> None:
    result = results(case)
    error = relative_error(logits(reader(result.folder)), result.logits)
    # The exporter divides by a scale where ModelOpt multiplies by its reciprocal, which makes another integer of one
    # weight in a million. Where inputs are quantized, too, each such difference moves others over a rounding border.
    quantizes_inputs = CASES[case].get("mode") in ("fp8", "int8-smoothquant")
    assert error < (2e-2 if quantizes_inputs else 1e-4)
    assert error < 0.7 * result.error, "a model that was not quantized at all would pass"


@pytest.mark.parametrize(
    "case", ["int4-weight-only", "int8-smoothquant", "int8-smoothquant, per channel", "int8-smoothquant, per both"]
)
def test_without_pre_quant_scale_the_logits_are_wrong(
    modelopt: None, results: Callable[[str], Result], tmp_path: Path, case: str
) -> None:
    result = results(case)
    tensors = load_file(result.folder / "model.safetensors")
    names = [name for name in tensors if name.endswith(".pre_quant_scale")]
    assert len(names) == LAYERS * len(LINEARS)
    for name in names:
        tensors[name][:] = 1
    save_file(tensors, tmp_path / "model.safetensors")
    for file in ("config.json", "hf_quant_config.json"):
        (tmp_path / file).write_bytes((result.folder / file).read_bytes())
    assert relative_error(logits(reader(tmp_path)), result.logits) > 0.05


EXPECTED_LAYER: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
    "int8-weight-only": {"weight": ("int8", (512, 128)), "weight_scale": ("float32", (512,))},
    "int4-weight-only": {
        "weight": ("uint8", (256, 128)),
        "weight_scale": ("float32", (512, 1)),
        "pre_quant_scale": ("float32", (128,)),
    },
    "fp8": {
        "weight": ("float8_e4m3fn", (512, 128)),
        "weight_scale": ("float32", ()),
        "input_scale": ("float32", ()),
    },
    "int8-smoothquant": {
        "weight": ("int8", (512, 128)),
        "weight_scale": ("float32", (1,)),
        "input_scale": ("float32", ()),
        "pre_quant_scale": ("float32", (128,)),
    },
    "int8-smoothquant, per channel": {
        "weight": ("int8", (512, 128)),
        "weight_scale": ("float32", (512,)),
        "input_scale": ("float32", ()),
        "pre_quant_scale": ("float32", (128,)),
    },
    "int8-smoothquant, per both": {
        "weight": ("int8", (512, 128)),
        "weight_scale": ("float32", (512,)),
        "pre_quant_scale": ("float32", (128,)),
    },
}


@pytest.mark.parametrize("case", EXPECTED_LAYER)
def test_layout_of_a_layer(modelopt: None, results: Callable[[str], Result], case: str) -> None:
    tensors = read_tensors(results(case).folder)
    layer = {name.removeprefix("h.0.mlp.c_fc."): t for name, t in tensors.items() if name.startswith("h.0.mlp.c_fc.")}
    expected = {**EXPECTED_LAYER[case], "bias": ("float32", (512,))}
    assert {name: (str(tensor.dtype), tensor.shape) for name, tensor in layer.items()} == expected


@pytest.mark.parametrize("case", partly_slow(CASES, QUICK))
def test_only_what_is_asked_for_is_quantized(
    modelopt: None, tiny: Checkpoint, results: Callable[[str], Result], case: str
) -> None:
    tensors = read_tensors(results(case).folder)
    original = {name.removeprefix("transformer."): t for name, t in load_file(tiny.path / "model.safetensors").items()}
    has_head, has_embeddings = (CASES[case].get(name, False) for name in ("quant_lm_head", "quant_embeddings"))
    for name, array in original.items():
        if name.endswith(tuple(f"{linear}.weight" for linear in LINEARS)):
            if "mode" not in CASES[case]:
                np.testing.assert_array_equal(tensors[name], array.T)
        elif not (name == "wte.weight" and has_head) and not (name == "wpe.weight" and has_embeddings):
            np.testing.assert_array_equal(tensors[name], array)
    assert ("wte.weight_scale" in tensors) == has_head
    assert ("wpe.weight_scale" in tensors) == has_embeddings
    assert ("lm_head.weight" in tensors) == (CASES[case].get("mode") == "fp8")


ALGORITHMS = {
    "int8-weight-only": "W8A16",
    "int4-weight-only": "W4A16_AWQ",
    "fp8": "FP8",
    "int8-smoothquant": "W8A8_SQ_PER_CHANNEL",
    None: None,
}


@pytest.mark.parametrize("case", partly_slow(CASES, QUICK))
def test_both_json_files_name_the_algorithms(modelopt: None, results: Callable[[str], Result], case: str) -> None:
    folder, settings = results(case).folder, CASES[case]
    description = json.loads((folder / "hf_quant_config.json").read_text())
    embedded = json.loads((folder / "config.json").read_text())["quantization_config"]
    mixed = case == "int8-smoothquant, head"  # its head is weight-only
    algorithm = "MIXED_PRECISION" if mixed else ALGORITHMS[settings.get("mode")]
    cache = {"int8": "INT8", "fp8": "FP8"}.get(settings.get("kv_cache_dtype", ""))
    assert description["producer"] == embedded["producer"] == {"name": "modelopt", "version": "0.47.0"}
    assert description["quantization"]["quant_algo"] == algorithm == embedded.get("quant_algo")
    assert description["quantization"]["kv_cache_quant_algo"] == cache
    assert ("kv_cache_scheme" in embedded) == (cache is not None)
    assert embedded["quant_method"] == "modelopt"


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
@pytest.mark.parametrize("case", partly_slow([c for c in CASES if CASES[c].get("kv_cache_dtype") != "int8"], QUICK))
def test_the_folder_is_what_modelopts_exporter_writes(
    modelopt: None, tiny: Checkpoint, config: Callable[..., QuantizationConfig], tmp_path: Path, case: str
) -> None:
    """Of the odd head in int4, which the exporter refuses, what it writes with one row more."""
    import torch
    from modelopt.torch.export import export_hf_checkpoint

    checkpoint = tiny
    if case == "int4-weight-only, head":
        checkpoint = make_checkpoint(tmp_path / "even", vocabulary=VOCABULARY - 1)
    settings = config(**CASES[case])
    model = quantizing.torch_model.load_torch_model(checkpoint.path)
    quantizing.calibration.quantize_model(model, settings, quantizing.text.calibration_samples(checkpoint, settings))
    export_hf_checkpoint(copy.deepcopy(model), dtype=torch.float32, export_dir=tmp_path / "theirs")
    quantizing.export.export(model, tmp_path / "ours", settings)
    assert hashes(tmp_path / "ours") == hashes(tmp_path / "theirs")


def test_an_int8_cache_is_written_as_an_fp8_one(modelopt: None, results: Callable[[str], Result]) -> None:
    int8, fp8 = read_tensors(results("int8 cache").folder), read_tensors(results("fp8 cache").folder)
    assert int8.keys() == fp8.keys()
    for layer in range(LAYERS):
        for which in ("k", "v"):
            name = f"h.{layer}.attn.{which}_proj.{which}_scale"
            assert int8[name].shape == fp8[name].shape == ()
            assert int8[name] * 127 == pytest.approx(fp8[name] * 448, rel=1e-6)


def test_int4_head_of_an_odd_vocabulary(modelopt: None, tiny: Checkpoint, results: Callable[[str], Result]) -> None:
    assert VOCABULARY % 2 == 1
    tensors = read_tensors(results("int4-weight-only, head").folder)
    assert tensors["wte.weight"].shape == ((VOCABULARY + 1) // 2, WIDTH)
    assert tensors["wte.weight_scale"].shape == (VOCABULARY + 1, 1)
    weight = load_file(tiny.path / "model.safetensors")["transformer.wte.weight"]
    expected = block_fake_quantize(weight)
    np.testing.assert_allclose(dequantize(tensors, "wte")[:VOCABULARY], expected, rtol=1e-6)
    assert not dequantize(tensors, "wte")[VOCABULARY:].any()


def test_a_head_of_its_own(modelopt: None, config: Callable[..., QuantizationConfig], tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "untied", tied=False, vocabulary=VOCABULARY - 1)
    quantization.quantize_checkpoint(checkpoint, config("int4-weight-only", quant_lm_head=True), tmp_path / "out")
    tensors = read_tensors(tmp_path / "out")
    original = load_file(checkpoint.path / "model.safetensors")
    np.testing.assert_array_equal(tensors["wte.weight"], original["transformer.wte.weight"])
    np.testing.assert_allclose(
        dequantize(tensors, "lm_head"), block_fake_quantize(original["lm_head.weight"]), rtol=1e-6
    )


def test_embeddings_of_their_own(modelopt: None, config: Callable[..., QuantizationConfig], tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "untied", tied=False)
    settings = config("int8-weight-only", quant_lm_head=True, quant_embeddings=True)
    quantization.quantize_checkpoint(checkpoint, settings, tmp_path / "out")
    tensors, original = read_tensors(tmp_path / "out"), load_file(checkpoint.path / "model.safetensors")
    for name, source in (("wte", "transformer.wte"), ("wpe", "transformer.wpe"), ("lm_head", "lm_head")):
        weight = original[f"{source}.weight"]
        expected = int_fake_quantize(weight, np.abs(weight).max(axis=1, keepdims=True))
        np.testing.assert_allclose(dequantize(tensors, name), expected, rtol=1e-6)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("case", ["int4-weight-only", "int8-smoothquant", "fp8, int8 cache"])
def test_same_input_same_bytes(
    modelopt: None,
    tiny: Checkpoint,
    config: Callable[..., QuantizationConfig],
    results: Callable[[str], Result],
    tmp_path: Path,
    case: str,
) -> None:
    import torch

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        quantization.quantize_checkpoint(tiny, config(**CASES[case]), tmp_path / "again")
    finally:
        torch.set_num_threads(threads)
    assert hashes(tmp_path / "again") == hashes(results(case).folder)


def test_the_folder_is_complete_and_readable(modelopt: None, results: Callable[[str], Result]) -> None:
    folder = results("fp8").folder
    files = {"config.json", "hf_quant_config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in folder.iterdir()} == files
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
    assert list(folder.parent.iterdir()) == [folder], "nothing is left beside it"


def test_the_tokens_that_end_a_text_come_along(
    modelopt: None, config: Callable[..., QuantizationConfig], tmp_path: Path
) -> None:
    """Also in a file that transformers reads and refuses to write: a temperature without sampling."""
    checkpoint = make_checkpoint(tmp_path / "source")
    without = quantization.cache_name(checkpoint, config("int8-weight-only"))
    endings = {"eos_token_id": [3, 5], "do_sample": False, "temperature": 0.5}
    (checkpoint.path / "generation_config.json").write_text(json.dumps(endings))
    checkpoint = open_checkpoint(checkpoint.path)
    assert quantization.cache_name(checkpoint, config("int8-weight-only")) != without
    quantization.quantize_checkpoint(checkpoint, config("int8-weight-only"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == endings
    assert open_checkpoint(tmp_path / "out").config.eos_token_ids == (3, 5)


def test_nothing_is_left_of_a_failure(
    modelopt: None,
    tiny: Checkpoint,
    config: Callable[..., QuantizationConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantizing.folders, "export", lambda model, folder, config: (folder / "half").touch() or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantization.quantize_checkpoint(tiny, config("int8-weight-only"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_numbers(
    modelopt: None, config: Callable[..., QuantizationConfig], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "broken")
    tensors = load_file(checkpoint.path / "model.safetensors")
    tensors["transformer.h.0.mlp.c_fc.weight"][3, 3] = np.nan
    save_file(tensors, checkpoint.path / "model.safetensors")
    expected = r"expected finite weights but transformer\.h\.0\.mlp\.c_fc\.weight holds infinities or NaNs"
    with pytest.raises(QuantizationError, match=expected):
        quantization.quantize_checkpoint(checkpoint, config("int8-weight-only"), tmp_path / "out")


def test_activations_that_are_not_numbers(
    modelopt: None, config: Callable[..., QuantizationConfig], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "huge")
    with changed(checkpoint) as tensors:
        tensors["transformer.h.0.mlp.c_fc.weight"] *= np.float32(1e38)
    with pytest.raises(QuantizationError, match="ModelOpt cannot calibrate this checkpoint: detected nan values"):
        quantization.quantize_checkpoint(checkpoint, config("fp8"), tmp_path / "out")


@contextlib.contextmanager
def changed(checkpoint: Checkpoint) -> Iterator[dict[str, np.ndarray]]:
    """A checkpoint's tensors, written back in the end."""
    tensors = load_file(checkpoint.path / "model.safetensors")
    yield tensors
    save_file(tensors, checkpoint.path / "model.safetensors")


@pytest.mark.parametrize("settings", [{}, {"per_channel": True, "per_token": True}], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    "pruned", partly_slow(["a feature", "all but one feature", "a layer", "nearly a feature"], ["a feature"])
)
def test_smoothquant_of_a_pruned_model(
    modelopt: None, config: Callable[..., QuantizationConfig], tmp_path: Path, pruned: str, settings: dict[str, bool]
) -> None:
    """Input features without weights can have any smoothing scale; ModelOpt alone ends in an IndexError."""
    checkpoint = make_checkpoint(tmp_path / "pruned")
    with changed(checkpoint) as tensors:
        for layer in LINEARS:
            weight = tensors[f"transformer.h.0.{layer}.weight"]  # (in, out)
            if pruned == "a feature":
                weight[5] = 0
            elif pruned == "all but one feature":
                weight[1:] = 0
            elif pruned == "nearly a feature":
                weight[5] *= np.float32(1e-25)
            elif layer == "mlp.c_fc":
                weight[:] = 0
    chosen = config("int8-smoothquant", **settings)
    quantization.quantize_checkpoint(checkpoint, chosen, tmp_path / "out")
    model = quantizing.torch_model.load_torch_model(checkpoint.path)
    exact = logits(model)
    quantizing.calibration.quantize_model(model, chosen, quantizing.text.calibration_samples(checkpoint, chosen))
    if pruned == "a feature":
        assert not model.transformer.h[0].mlp.c_fc.weight[:, 5].any(), "it is pruned still"
    assert relative_error(logits(model), exact) < 3e-2
    assert relative_error(logits(reader(tmp_path / "out")), logits(model)) < 2e-2


def test_a_layer_of_zeros_in_fp8(modelopt: None, config: Callable[..., QuantizationConfig], tmp_path: Path) -> None:
    """Weights and a cache: zero divided by a scale of zero would be stored as NaN."""
    checkpoint = make_checkpoint(tmp_path / "zero")
    with changed(checkpoint) as tensors:
        tensors["transformer.h.0.mlp.c_fc.weight"][:] = 0
        tensors["transformer.h.1.attn.c_attn.weight"][:, WIDTH:] = 0
        tensors["transformer.h.1.attn.c_attn.bias"][WIDTH:] = 0
    quantization.quantize_checkpoint(checkpoint, config("fp8", kv_cache_dtype="fp8"), tmp_path / "out")
    tensors = read_tensors(tmp_path / "out")
    assert not tensors["h.0.mlp.c_fc.weight"].astype(np.float32).any()
    scales = ("h.0.mlp.c_fc.weight_scale", "h.1.attn.k_proj.k_scale", "h.1.attn.v_proj.v_scale")
    assert [float(tensors[name]) for name in scales] == [1, 1, 1]


def test_tensors_that_are_not_there(modelopt: None, config: Callable[..., QuantizationConfig], tmp_path: Path) -> None:
    """transformers would make them up."""
    checkpoint = make_checkpoint(tmp_path / "part")
    with changed(checkpoint) as tensors:
        del tensors["transformer.h.1.mlp.c_fc.bias"]
    with pytest.raises((QuantizationError, CheckpointError), match=r"h\.1\.mlp\.c_fc\.bias"):
        quantization.quantize_checkpoint(checkpoint, config("int8-weight-only"), tmp_path / "out")


@pytest.mark.parametrize("kilobytes", [1, 100])
def test_a_full_disk_leaves_nothing(
    modelopt: None,
    tiny: Checkpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kilobytes: int,
) -> None:
    """Full at the configuration, which Python writes, and at the weights, which safetensors does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes << 10, hard))
    try:
        arguments = ["--model-type", str(tiny.path), "--quant-mode", "int8-weight-only"]
        assert quantization.main([*arguments, "--output", str(tmp_path / "out")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert error.startswith(f"quantization.py: error: cannot write {tmp_path / 'out'}: ") and error.count("\n") == 1
    assert "too large" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file that nobody can read is needed: Linux's /proc")
def test_a_tokenizer_that_cannot_be_read_is_told_before_the_work(
    tiny: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(tiny.path, folder)
    path = folder / "special_tokens_map.json"
    path.unlink(missing_ok=True)
    path.symlink_to("/proc/self/mem")
    monkeypatch.setattr(quantizing.folders, "load_torch_model", lambda path: pytest.fail("the work began"))
    arguments = ["--model-type", str(folder), "--quant-mode", "int8-weight-only", "--output", str(tmp_path / "out")]
    assert quantization.main(arguments) == 2
    assert f"cannot read {path}: Input/output error" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Calibration text
# ---------------------------------------------------------------------------------------------------------------------


def test_samples_are_windows_at_even_distances(tiny: Checkpoint, config: Callable[..., QuantizationConfig]) -> None:
    samples = quantizing.text.calibration_samples(tiny, config("fp8", calib_size=3, calib_length=10))
    text = np.frombuffer(TEXT.encode(), np.uint8)
    last = len(text) - 10
    expected = [text[start : start + 10] for start in (0, last // 2, last)]
    np.testing.assert_array_equal(samples, expected)


def test_a_text_as_short_as_a_sample_is_taken_once(
    tiny: Checkpoint, config: Callable[..., QuantizationConfig], tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("x" * CONTEXT)
    samples = quantizing.text.calibration_samples(tiny, config("fp8", calib_data=str(tmp_path / "short.txt")))
    assert samples.shape == (1, CONTEXT)  # the default length is no more than the context


def test_the_default_text_is_enough_for_the_defaults() -> None:
    checkpoint = open_checkpoint(EMBEDDED_CHECKPOINT)
    samples = quantizing.text.calibration_samples(checkpoint, QuantizationConfig("fp8"))
    assert samples.shape == (quantizing.settings.CALIB_SIZE, quantizing.settings.CALIB_LENGTH)


def test_the_default_text_is_of_the_training_text() -> None:
    shakespeare = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
    if not shakespeare.is_file():
        pytest.skip(f"{shakespeare} is not there")
    text = shakespeare.read_text("utf-8")
    train, validation = text[: int(len(text) * 0.9)], text[int(len(text) * 0.9) :]
    scenes = quantizing.text.CALIBRATION_TEXT.read_text("utf-8").split("\n\n")
    assert all(scene.strip("\n") in train for scene in scenes)
    assert sum(scene in validation for scene in scenes if len(scene) > 100) == 0


@pytest.fixture
def fake_datasets(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """Stands in for the `datasets` package: the hub is not reached from here."""

    class Split(list[dict[str, Any]]):
        def take(self, count: int) -> list[dict[str, Any]]:
            return self[:count]

    calls: list[tuple[Any, ...]] = []
    rows = [{"id": str(n), "article": f"Article {n}. {TEXT}"} for n in range(9)]

    def load_dataset(name: str, configuration: str | None, split: str, streaming: bool) -> Split:
        calls.append((name, configuration, split))
        if "absent" in name:
            raise FileNotFoundError(f"Dataset {name}\ndoesn't exist")
        return Split([{"pixels": 3}] if "images" in name else rows)

    module = types.SimpleNamespace(load_dataset=load_dataset, calls=calls)
    monkeypatch.setitem(sys.modules, "datasets", module)
    yield module


def test_a_hub_data_set(
    tiny: Checkpoint, config: Callable[..., QuantizationConfig], fake_datasets: types.SimpleNamespace
) -> None:
    settings = config("fp8", calib_data="cnn_dailymail", calib_size=2)
    text, _ = quantizing.text.calibration_text(settings)
    assert text == f"Article 0. {TEXT}\n\nArticle 1. {TEXT}"
    assert fake_datasets.calls == [("abisee/cnn_dailymail", "3.0.0", "train")]
    assert quantizing.text.calibration_samples(tiny, settings).shape == (2, CONTEXT)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("someone/absent", "cannot be loaded from the hub: Dataset someone/absent doesn't exist"),
        ("someone/images", "expected a column of text in the data set 'someone/images' but its columns are: pixels"),
    ],
)
def test_an_unusable_hub_data_set(
    config: Callable[..., QuantizationConfig], fake_datasets: types.SimpleNamespace, name: str, expected: str
) -> None:
    with pytest.raises(QuantizationError, match=expected):
        quantizing.text.calibration_text(config("fp8", calib_data=name))


# ---------------------------------------------------------------------------------------------------------------------
# The cache
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def name(tiny: Checkpoint, config: Callable[..., QuantizationConfig]) -> Callable[..., str]:
    return lambda *args, **settings: quantization.cache_name(tiny, config(*args, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_lm_head": True},
        {"calib_size": 5},
        {"calib_length": 9},
        {"kv_cache_dtype": "fp8"},
        {"kv_cache_dtype": "int8"},
        {"calib_data": "cnn_dailymail"},
        {"calib_data": None},
    ],
)
def test_every_setting_has_its_own_name(name: Callable[..., str], settings: dict[str, Any]) -> None:
    assert name("int4-weight-only", **settings) != name("int4-weight-only")


def test_modes_have_their_own_names(name: Callable[..., str]) -> None:
    assert len({name(mode) for mode in quantization.MODES}) == len(quantization.MODES)
    assert name("int8-smoothquant", per_token=True) != name("int8-smoothquant", per_channel=True)


def test_what_changes_nothing_changes_no_name(name: Callable[..., str], text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "copy.txt").write_bytes(text_file.read_bytes())
    assert name("fp8", calib_data=str(tmp_path / "copy.txt")) == name("fp8")
    # int8 weights follow from the weights alone; an int8 cache does not.
    assert name("int8-weight-only", calib_size=9, calib_data=None) == name("int8-weight-only")
    cache = {"kv_cache_dtype": "int8"}
    assert name("int8-weight-only", calib_size=9, **cache) != name("int8-weight-only", **cache)


def test_another_text_has_another_name(name: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    before = name("fp8", calib_data=str(path))
    path.write_text(TEXT + "!")
    assert name("fp8", calib_data=str(path)) != before


@pytest.mark.parametrize("changed", ["weights", "tokenizer", "requirements"])
def test_other_sources_have_other_names(
    config: Callable[..., QuantizationConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    before = quantization.cache_name(checkpoint, config("fp8"))
    if changed == "weights":
        tensors = load_file(checkpoint.path / "model.safetensors")
        tensors["transformer.ln_f.bias"][0] += 1
        save_file(tensors, checkpoint.path / "model.safetensors")
    elif changed == "tokenizer":
        path = checkpoint.path / "tokenizer.json"
        path.write_text(path.read_text() + " ")
    else:
        (tmp_path / "requirements.txt").write_text("nvidia-modelopt==0.48.0\n")
        monkeypatch.setattr(quantizing.cache, "REQUIREMENTS", tmp_path / "requirements.txt")
    assert quantization.cache_name(open_checkpoint(checkpoint.path), config("fp8")) != before


def test_a_second_run_finds_the_first_ones_folder(
    modelopt: None, tiny: Checkpoint, config: Callable[..., QuantizationConfig], tmp_path: Path
) -> None:
    messages: list[str] = []
    first = quantization.cached_checkpoint(tiny, config("int8-weight-only"), tmp_path / "cache", messages.append)
    before = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    again = quantization.cached_checkpoint(tiny, config("int8-weight-only"), tmp_path / "cache", messages.append)
    assert again == first and first.parent == tmp_path / "cache"
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == before
    assert messages == [f"quantizing {tiny.path}, once: the result is kept in {first}"]


def test_a_cached_run_imports_neither_torch_nor_modelopt(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
import quantization
from weight_loader import open_checkpoint

checkpoint = open_checkpoint("checkpoints/shakespeare")
config = quantization.QuantizationConfig("int4-weight-only")
cached = Path({str(tmp_path)!r}) / quantization.cache_name(checkpoint, config)
cached.mkdir()
(cached / "config.json").write_text("{{}}")
assert quantization.cached_checkpoint(checkpoint, config, Path({str(tmp_path)!r})) == cached
heavy = {{"torch", "transformers", "modelopt", "tqdm", "nvtripy"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert quantization.default_cache() == Path("/somewhere/nanogpt-tripy/quantized")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert quantization.default_cache() == Path.home() / ".cache" / "nanogpt-tripy" / "quantized"


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line, exit code 2
# ---------------------------------------------------------------------------------------------------------------------


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert quantization.main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("quantization.py: error: ")
    return err.removeprefix("quantization.py: error: ").strip()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--quant-mode", "int3"],
            "expected a quantization mode of int8-weight-only, int4-weight-only, fp8, int8-smoothquant but got 'int3'",
        ),
        (["--kv-cache-dtype", "int4"], "expected a KV cache dtype of float16, int8, fp8 but got 'int4'"),
        ([], "expected a quantization mode or a KV cache dtype other than float16 but got none"),
        (
            ["--kv-cache-dtype", "fp8", "--quant-lm-head"],
            "expected a quantization mode with --quant-lm-head but got none",
        ),
        (
            ["--quant-mode", "fp8", "--per-channel"],
            "expected --per-channel with int8-smoothquant only but got it with fp8",
        ),
        (
            ["--quant-mode", "fp8", "--quant-embeddings"],
            "expected --quant-embeddings with int8-weight-only only but got it with fp8",
        ),
        (["--quant-mode", "fp8", "--calib-size", "0"], "expected --calib-size to be at least 1 but got 0"),
        (["--quant-mode", "fp8", "--calib-length", "-1"], "expected --calib-length to be at least 1 but got -1"),
        (["--quant-mode", "fp8", "--calib-length", "x"], "argument --calib-length: invalid int value: 'x'"),
        (
            ["--quant-mode", "fp8", "--calib-length", "513"],
            "expected --calib-length to be at most the context of 512 but got 513",
        ),
        (["--quant-mode", "fp8", "--no-such"], "unrecognized arguments: --no-such"),
        (["--quant-mode", "fp8", "--model-type", "nowhere"], "no model 'nowhere'"),
        (
            ["--quant-mode", "fp8", "--calib-data", "nowhere.txt"],
            "cannot read nowhere.txt: No such file or directory",
        ),
    ],
)
def test_unusable_arguments(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], expected: str
) -> None:
    assert fails(capsys, "--output", tmp_path / "out", *arguments).startswith(expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "expected text to calibrate on but {path} is empty"),
        (b" \n\n ", "expected text to calibrate on but {path} is empty"),
        (b"caf\xe9", "expected UTF-8 text in {path} but byte 3 is not"),
        (b"PK\3\4\0\0", "expected UTF-8 text in {path} but byte 4 is NUL: it is a binary file"),
        ("caf\xe9".encode("utf-16"), "expected UTF-8 text in {path} but it is UTF-16: save it as UTF-8"),
        (b"Hi", "expected at least 256 tokens to calibrate on (one sample) but {path} has "),
    ],
)
def test_unusable_calibration_text(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes, expected: str
) -> None:
    path = tmp_path / "calibration"
    path.write_bytes(content)
    message = fails(capsys, "--output", tmp_path / "out", "--quant-mode", "fp8", "--calib-data", path)
    assert message.startswith(expected.format(path=path))


def test_a_folder_as_calibration_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = fails(capsys, "--output", tmp_path / "out", "--quant-mode", "fp8", "--calib-data", tmp_path)
    assert message == f"cannot read {tmp_path}: Is a directory"


def test_a_calibration_text_from_windows_is_the_same_text(tmp_path: Path) -> None:
    texts = []
    for name, content in (("unix", b"one\ntwo\n"), ("windows", b"\xef\xbb\xbfone\r\ntwo\r\n")):
        (tmp_path / name).write_bytes(content)
        texts.append(quantizing.text.calibration_text(QuantizationConfig("fp8", calib_data=str(tmp_path / name)))[0])
    assert texts == ["one\ntwo\n"] * 2


def test_a_data_set_without_the_package_for_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = fails(capsys, "--output", tmp_path / "out", "--quant-mode", "fp8", "--calib-data", "cnn_dailymail")
    assert message == "there is no file 'cnn_dailymail', and the data set of that name needs: pip install datasets"


@pytest.mark.parametrize("missing", ["torch", "modelopt", "transformers"])
def test_packages_that_are_not_installed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for loaded in [module for module in sys.modules if module == missing or module.startswith(f"{missing}.")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, missing, None)
    message = fails(capsys, "--output", tmp_path / "out", "--quant-mode", "int8-weight-only")
    assert message.startswith("quantizing needs the packages of requirements/quant.txt (")
    assert message.endswith("): pip install -r requirements/quant.txt")


def test_a_width_that_the_block_does_not_divide(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    narrow = make_checkpoint(tmp_path / "narrow", width=96)
    message = fails(
        capsys, "--model-type", narrow.path, "--output", tmp_path / "out", "--quant-mode", "int4-weight-only"
    )
    assert message == (
        "expected the int4 block of 128 to divide the 96 input features of h.0.attn.c_attn: try --group-size 32"
    )


def test_an_output_folder_that_exists(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    assert fails(capsys, "--output", tmp_path, "--quant-mode", "fp8") == f"expected {tmp_path} not to exist but it does"


def test_an_output_folder_that_cannot_be_made(
    modelopt: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "out"
    message = fails(capsys, "--output", target, "--quant-mode", "int8-weight-only")
    assert message.startswith(f"cannot write {target}: ")


def test_the_command(modelopt: None, capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Checkpoint) -> None:
    arguments = ["--model-type", str(tiny.path), "--output", str(tmp_path / "out"), "--quant-mode", "int8-weight-only"]
    assert quantization.main(arguments) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"wrote {tmp_path / 'out'}: int8-weight-only, 0.6 MB\n"

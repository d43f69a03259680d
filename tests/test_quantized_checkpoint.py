"""Quantized folders on the portable runtime against ModelOpt's own fake-quantized torch model.

In float16, as they are run: 5e-3 relative to the norm covers float16's rounding of activations and scales. Where inputs
are rounded to 8 bits, too, a difference in the last bit before that rounding becomes a whole step after it for a few
elements: 2e-2.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import nvtripy as tp
import pytest
import torch
from safetensors.torch import load_file, save_file
from selection import partly_slow
from test_model import relative_error, save_random, stateless_logits

import quantizing.calibration
import quantizing.export
import quantizing.text
import quantizing.torch_model
import weight_loader
from command_line import EMBEDDED_CHECKPOINT
from engine import Engine, compile_model, config_of, load_model
from loading import modelopt_layout
from quantization import QuantizationConfig
from weight_loader import Checkpoint, open_checkpoint

pytest.importorskip("modelopt.torch.quantization", reason="nvidia-modelopt is not installed")

CASES: dict[str, dict[str, Any]] = {
    "int8-weight-only": {"mode": "int8-weight-only"},
    "int8-weight-only, head": {"mode": "int8-weight-only", "quant_lm_head": True},
    "full int8": {"mode": "int8-weight-only", "quant_lm_head": True, "quant_embeddings": True},
    "int4-weight-only": {"mode": "int4-weight-only"},
    "int4-weight-only, head": {"mode": "int4-weight-only", "quant_lm_head": True},
    "fp8": {"mode": "fp8"},
    "fp8, head": {"mode": "fp8", "quant_lm_head": True},
    "int8-smoothquant": {"mode": "int8-smoothquant"},
    "int8-smoothquant, per channel": {"mode": "int8-smoothquant", "per_channel": True},
    "int8-smoothquant, per token": {"mode": "int8-smoothquant", "per_token": True},
    "int8-smoothquant, all": {
        "mode": "int8-smoothquant",
        "per_channel": True,
        "per_token": True,
        "quant_lm_head": True,
    },
    "int8 cache": {"kv_cache_dtype": "int8"},
    "fp8 cache": {"kv_cache_dtype": "fp8"},
    "int4-weight-only, fp8 cache": {"mode": "int4-weight-only", "kv_cache_dtype": "fp8"},
}
QUICK = ("int4-weight-only", "fp8, head")
MODES = ("int8-weight-only", "int4-weight-only", "fp8", "int8-smoothquant")


def tolerance(case: str) -> float:
    return 2e-2 if CASES[case].get("mode") in ("fp8", "int8-smoothquant") else 5e-3


@dataclass
class Quantized:
    """A quantized folder and what ModelOpt's model, from which it was exported, says to `idx` (1, T)."""

    folder: Path
    idx: np.ndarray
    logits: np.ndarray
    noise: float  # between ModelOpt's model computed in float32 and in float64


def quantize(source: Path, folder: Path, idx: np.ndarray, **settings: Any) -> Quantized:
    checkpoint = open_checkpoint(source)
    config = QuantizationConfig(**settings)
    model = quantizing.torch_model.load_torch_model(source)
    quantizing.calibration.quantize_model(model, config, quantizing.text.calibration_samples(checkpoint, config))
    with torch.no_grad():
        ids = torch.from_numpy(idx.astype(np.int64))
        logits = model(ids, use_cache=False).logits.numpy()
        in_float64 = copy.deepcopy(model).double()(ids, use_cache=False).logits.numpy()
    quantizing.export.export(model, folder, config)
    return Quantized(folder, idx, logits, relative_error(logits, in_float64))


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Quantized]:
    """The embedded checkpoint, each case once; its logits for words that it has not been trained on."""
    made: dict[str, Quantized] = {}
    idx = np.random.default_rng(3).integers(0, 1024, (1, 96)).astype(np.int32)

    def get(case: str) -> Quantized:
        if case not in made:
            folder = tmp_path_factory.mktemp("quantized") / "folder"
            made[case] = quantize(EMBEDDED_CHECKPOINT, folder, idx, calib_size=8, **CASES[case])
        return made[case]

    return get


def error_of(quantized: Quantized, checkpoint: Checkpoint | None = None, dtype: str = "float16") -> float:
    checkpoint = checkpoint or open_checkpoint(quantized.folder)
    gpt = load_model(checkpoint, config_of(checkpoint, dtype))
    return relative_error(stateless_logits(gpt, quantized.idx), quantized.logits)


@pytest.mark.parametrize("case", partly_slow(CASES, QUICK))
def test_embedded_checkpoint(embedded: Callable[[str], Quantized], case: str) -> None:
    assert error_of(embedded(case)) <= tolerance(case)


@pytest.mark.parametrize(
    "case",
    partly_slow(
        ["int8-weight-only", "full int8", "int4-weight-only, fp8 cache", "fp8, head", "int8-smoothquant"],
        ["fp8, head"],
    ),
)
def test_cached_steps(embedded: Callable[[str], Quantized], case: str) -> None:
    """Prefill and single steps give what ModelOpt's model gives without a cache."""
    quantized = embedded(case)
    checkpoint = open_checkpoint(quantized.folder)
    config = config_of(checkpoint, "float16")
    engine = Engine(compile_model(load_model(checkpoint, config), 1), config, 1)
    zero = np.zeros(1, np.int32)
    found = [engine.step(quantized.idx[:, :80], zero, zero + 79)]
    found += [engine.step(quantized.idx[:, at : at + 1], zero + at, zero) for at in range(80, 96)]
    assert relative_error(np.stack(found, axis=1), quantized.logits[:, 79:]) <= tolerance(case)


def save_gpt2(folder: Path, **architecture: Any) -> Path:
    """GPT-2's own size with random weights, and as its tokenizer the embedded one, whose ids are among GPT-2's."""
    save_random(folder, **architecture)
    for file in weight_loader.TOKENIZER_FILES:
        if (EMBEDDED_CHECKPOINT / file).is_file():
            shutil.copyfile(EMBEDDED_CHECKPOINT / file, folder / file)
    return folder


@pytest.fixture(scope="module")
def gpt2_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gpt2(tmp_path_factory.mktemp("124m"))


@pytest.mark.parametrize("case", MODES)
@pytest.mark.slow
def test_124m(gpt2_size: Path, tmp_path: Path, case: str) -> None:
    idx = np.random.default_rng(4).integers(0, 50257, (1, 24)).astype(np.int32)
    quantized = quantize(gpt2_size, tmp_path / "folder", idx, calib_size=2, calib_length=64, **CASES[case])
    if case != "fp8":
        assert error_of(quantized) <= tolerance(case)
    else:
        # fp8's steps are a sixteenth of a number. Twelve layers of random weights make 3 % of the logits of the last
        # bit of a sum, or of an input on the other side of a step: ModelOpt's own model is that far from itself
        # computed in float64, and nothing can be nearer.
        assert error_of(quantized, dtype="float32") <= 2 * quantized.noise


@pytest.mark.slow
def test_two_layers_of_124m_in_fp8(tmp_path: Path) -> None:
    """As wide as GPT-2, and too shallow for such differences to pile up; in float32, as ModelOpt computes."""
    idx = np.random.default_rng(4).integers(0, 50257, (1, 24)).astype(np.int32)
    source = save_gpt2(tmp_path / "source", n_layer=2)
    quantized = quantize(source, tmp_path / "folder", idx, calib_size=2, calib_length=64, mode="fp8")
    assert error_of(quantized, dtype="float32") <= tolerance("fp8")


class MutilatedCheckpoint(Checkpoint):
    """Reads a quantized folder with one mistake."""

    mistake = ""

    def parameters(self, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
        tensors = dict(super().parameters(dtype))
        for layer in [name.removesuffix(".pre_quant_scale") for name in tensors if name.endswith("pre_quant_scale")]:
            self.spoil(layer, tensors)
        yield from tensors.items()

    def spoil(self, layer: str, tensors: dict[str, np.ndarray]) -> None:
        if self.mistake == "no pre_quant_scale":
            tensors[f"{layer}.pre_quant_scale"][:] = 1
        if self.mistake == "blocks along the outputs":
            weight, scale = tensors[f"{layer}.weight"], tensors[f"{layer}.weight_scale"]  # (in, out), (in / 128, out)
            block = modelopt_layout.BLOCK
            numbers = weight / np.repeat(scale, block, axis=0)
            # The same scales, read as (out / 128, in).
            swapped = np.repeat(scale.T.reshape(weight.shape[1] // block, -1), block, axis=0).T
            tensors[f"{layer}.weight"] = np.ascontiguousarray(numbers * swapped, weight.dtype)
            blocks = np.abs(tensors[f"{layer}.weight"]).reshape(-1, block, weight.shape[1])
            tensors[f"{layer}.weight_scale"] = (blocks.max(axis=1) / 7).astype(scale.dtype)


@pytest.mark.parametrize(
    ("case", "mistake"),
    [
        ("int4-weight-only", "no pre_quant_scale"),
        ("int4-weight-only", "blocks along the outputs"),
        ("int8-smoothquant", "no pre_quant_scale"),
    ],
)
@pytest.mark.slow
def test_mistakes_show(
    embedded: Callable[[str], Quantized], monkeypatch: pytest.MonkeyPatch, case: str, mistake: str
) -> None:
    monkeypatch.setattr(MutilatedCheckpoint, "mistake", mistake)
    assert error_of(embedded(case), MutilatedCheckpoint(embedded(case).folder)) > 2 * tolerance(case)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", partly_slow(CASES, QUICK))
def test_the_graph_finds_the_stored_numbers_again(embedded: Callable[[str], Quantized], case: str, dtype: str) -> None:
    """What the loader dequantizes, the graph quantizes to the same integers, in every type that the model may have."""
    checkpoint = open_checkpoint(embedded(case).folder)
    stored = load_file(embedded(case).folder / "model.safetensors")
    gpt = load_model(checkpoint, config_of(checkpoint, dtype))
    layer = gpt.h[0].mlp.c_fc
    if layer.mode is None:
        return
    dim = 0 if layer.weight_scale.rank == 1 else None
    found = tp.cast(tp.quantize(layer.weight, layer.weight_scale, layer.mode.weight, dim), tp.float32)
    numbers = np.from_dlpack(tp.copy(found, tp.device("cpu")))
    weight = stored["transformer.h.0.mlp.c_fc.weight"]
    if weight.dtype == torch.uint8:
        low, high = (((weight.numpy() >> shift) & 15).astype(np.int8) for shift in (0, 4))
        expected = np.stack([low, high], axis=1).reshape(-1, weight.shape[1])
        expected = (expected - 16 * (expected > 7)).T
    else:
        expected = weight.float().numpy()
    np.testing.assert_array_equal(numbers, expected)


# --- folders that are not what they should be -------------------------------------------------------------------------


Tensors = dict[str, torch.Tensor]


def damage_tensors(edit: Callable[[Tensors], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path)

    return damage


def damage_text(file: str, old: str, new: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new))

    return damage


LAYER, TABLE = "transformer.h.1.mlp.c_fc", "transformer.wpe"


def halved(tensors: Tensors) -> None:
    tensors[f"{LAYER}.weight_scale"] = tensors[f"{LAYER}.weight_scale"][:, :1].clone()


def negative(tensors: Tensors) -> None:
    tensors[f"{LAYER}.weight_scale"][3] = -1


def not_a_number(tensors: Tensors) -> None:
    tensors[f"{LAYER}.input_scale"].fill_(torch.nan)


@pytest.mark.parametrize(
    ("case", "damage", "message"),
    [
        (
            "int4-weight-only",
            damage_tensors(lambda t: t.pop(f"{LAYER}.weight_scale")),
            "missing: h.1.mlp.c_fc.weight_scale",
        ),
        (
            "int4-weight-only",
            damage_tensors(lambda t: t.pop(f"{LAYER}.pre_quant_scale")),
            "missing: h.1.mlp.c_fc.pre_quant_scale",
        ),
        ("fp8", damage_tensors(lambda t: t.pop(f"{LAYER}.input_scale")), "missing: h.1.mlp.c_fc.input_scale"),
        (
            "int8 cache",
            damage_tensors(lambda t: t.pop("transformer.h.2.attn.v_proj.v_scale")),
            "missing: h.2.attn.v_proj.v_scale",
        ),
        ("int4-weight-only", damage_tensors(halved), f"{LAYER}.weight_scale (expected (1024, 2), got (1024, 1))"),
        ("int8-weight-only", damage_tensors(negative), "h.1.mlp.c_fc.weight_scale to hold finite numbers"),
        ("fp8", damage_tensors(not_a_number), "h.1.mlp.c_fc.input_scale to hold finite numbers"),
        (
            "int8-weight-only",
            damage_tensors(lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"].float()})),
            f"{LAYER}.weight (expected I8, got F32)",
        ),
        (
            "int8-weight-only",
            damage_tensors(lambda t: t.update({f"{LAYER}.zeros": torch.zeros(1)})),
            f"unexpected: {LAYER}.zeros",
        ),
        ("full int8", damage_tensors(lambda t: t.pop(f"{TABLE}.weight_scale")), "missing: wpe.weight_scale"),
        ("full int8", damage_tensors(lambda t: t.pop("transformer.wte.weight_scale")), "missing: wte.weight_scale"),
        (
            "full int8",
            damage_tensors(lambda t: t.update({f"{TABLE}.weight": t[f"{TABLE}.weight"][:500].clone()})),
            f"{TABLE}.weight (expected (512, 256), got (500, 256))",
        ),
        (
            "full int8",
            damage_tensors(lambda t: t.update({f"{TABLE}.weight_scale": t[f"{TABLE}.weight_scale"][:256].clone()})),
            f"{TABLE}.weight_scale (expected (512,), got (256,))",
        ),
        (
            "full int8",
            damage_tensors(lambda t: t[f"{TABLE}.weight_scale"][7:8].fill_(torch.nan)),
            "wpe.weight_scale to hold finite numbers that are not negative but got nan",
        ),
        (
            "full int8",
            damage_tensors(lambda t: t.update({"lm_head.weight": torch.zeros(1024, 256)})),
            "expected a head that shares the embedding's weight to be quantized as that is",
        ),
        (
            "int4-weight-only, head",
            damage_tensors(lambda t: t.update({f"{TABLE}.weight": t[f"{TABLE}.weight"].char()})),
            f"{TABLE}.weight (expected F32, F16, BF16, F64, got I8)",
        ),
        ("int8-weight-only", damage_text("hf_quant_config.json", "W8A16", "W2A16"), "but got 'W2A16'"),
        ("int4-weight-only", damage_text("hf_quant_config.json", "128", "64"), "(expected (768, 4), got (768, 2))"),
        (
            "int4-weight-only",
            damage_text("hf_quant_config.json", "128", "-64"),
            "group_size of W4A16_AWQ to be a positive integer but got -64",
        ),
        ("int4-weight-only", damage_text("hf_quant_config.json", "128", "100"), "block of 100 divides but got 256"),
        ("int8 cache", damage_text("hf_quant_config.json", "INT8", "INT2"), "but got 'INT2'"),
        ("int8-weight-only", damage_text("hf_quant_config.json", "{", "["), "not valid JSON"),
        ("int8-weight-only", damage_text("config.json", '"modelopt"', '"gptq"'), 'to be modelopt, got "gptq"'),
        ("fp8", lambda folder: (folder / "hf_quant_config.json").unlink(), "hf_quant_config.json is missing"),
    ],
)
def test_bad_folders(
    embedded: Callable[[str], Quantized],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    import example

    folder = tmp_path / "folder"
    shutil.copytree(embedded(case).folder, folder)
    for file in weight_loader.TOKENIZER_FILES:
        if (EMBEDDED_CHECKPOINT / file).is_file():
            shutil.copyfile(EMBEDDED_CHECKPOINT / file, folder / file)
    damage(folder)
    capsys.readouterr()  # of calibration, where this test is the first to need the folder
    monkeypatch.setattr("sys.argv", ["example.py", "--input-text", "x", "--model-type", str(folder)])
    assert example.main() == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1 and message in output.err, output.err


def test_a_width_that_the_block_does_not_divide(embedded: Callable[[str], Quantized], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(embedded("int4-weight-only").folder, folder)
    damage_text("config.json", '"n_embd": 256', '"n_embd": 320')(folder)
    with pytest.raises(weight_loader.CheckpointError, match="the int4 block of 128 divides but got 320"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"quant_algo": ["W8A16"]},
        {"quant_algo": {}},
        {"kv_cache_quant_algo": []},
        {"kv_cache_quant_algo": {"a": 1}},
        {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"transformer.h.0.x": {"quant_algo": ["FP8"]}}},
    ],
)
def test_names_that_are_no_texts_are_refused(entry: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected (quant_algo|kv_cache_quant_algo) to be one of"):
        modelopt_layout.read_description(
            {"quantization": {"quant_algo": "W8A16", "kv_cache_quant_algo": None, **entry}}
        )

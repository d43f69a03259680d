"""qat.py: what a prepared model computes, how it learns, and that the exported folder holds exactly that.

ModelOpt's rounding stands against NumPy's here (`int_fake_quantize`), bit for bit, and the folder on the portable
runtime against the torch model that was trained: 5e-3 relative to the norm in float16, as for the other folders of
weights without rounded inputs, and 1e-5 in float32, where nothing but the order of summation differs.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_model import relative_error, stateless_logits
from test_quantization import int_fake_quantize
from tiny_checkpoints import CONTEXT, VOCABULARY, random_checkpoint
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

pytest.importorskip("modelopt.torch.quantization", reason="nvidia-modelopt is not installed")

import weight_loader
from engine import config_of, load_model
from quantization import QuantizationError
from training import qat
from weight_loader import open_checkpoint

IDS = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY - 1, (2, 24)))


def new_model(seed: int = 0, **architecture: Any) -> GPT2LMHeadModel:
    """Random, with rows of very different sizes, so that a scale a tensor would not do."""
    sizes = {"vocab_size": VOCABULARY, "n_positions": CONTEXT, "n_embd": 48, "n_layer": 2, "n_head": 4}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    torch.manual_seed(seed)
    tokens = {"bos_token_id": None, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(**sizes | dropout | tokens | architecture)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                rows = parameter.T if ".h." in name else parameter  # a Conv1D's are (in, out)
                rows.mul_(3 * torch.exp(torch.randn(len(rows), 1)))
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model


def rounded_by_numpy(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """A float model whose weights are those that a float model would have if it were quantized."""
    other = GPT2LMHeadModel(model.config).eval()
    other.load_state_dict(model.state_dict())
    for name, parameter in other.named_parameters():
        if parameter.dim() == 2:
            rows = parameter.detach().numpy()
            rows = rows.T if ".h." in name else rows  # a Conv1D's are (in, out)
            rows = int_fake_quantize(rows, np.abs(rows).max(axis=1, keepdims=True))
            parameter.data = torch.from_numpy(np.ascontiguousarray(rows.T if ".h." in name else rows))
    other.tie_weights()
    return other


def logits_of(model: GPT2LMHeadModel) -> np.ndarray:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits.numpy()


def loss_of(model: GPT2LMHeadModel) -> torch.Tensor:
    return F.cross_entropy(model(IDS[:, :-1], use_cache=False).logits.flatten(0, 1), IDS[:, 1:].flatten())


def learn(model: GPT2LMHeadModel, steps: int, **settings: float) -> list[float]:
    """Trains with AdamW of these settings; returns the loss before each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **settings)
    losses = []
    for _ in range(steps):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return request.param


def test_a_prepared_model_computes_with_rounded_weights(tied: bool) -> None:
    model = new_model(tie_word_embeddings=tied)
    expected, in_float = logits_of(rounded_by_numpy(model)), logits_of(model)
    names = [name for name, _ in model.named_parameters()]
    qat.prepare(model)
    assert relative_error(logits_of(model), expected) < 1e-6
    assert relative_error(in_float, expected) > 1e-3, "a model that was not rounded at all would pass"
    assert [name for name, _ in model.named_parameters()] == names
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied


def test_gradients_pass_straight_through(tied: bool) -> None:
    """The gradient of each float weight is that of the rounded weight in its place: nothing is cut off."""
    model = new_model(tie_word_embeddings=tied)
    rounded = rounded_by_numpy(model)
    qat.prepare(model)
    loss_of(model).backward()
    loss_of(rounded).backward()
    expected = dict(rounded.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = expected[name].grad
        assert parameter.grad is not None and gradient is not None
        gradient = gradient.T if gradient.dim() == 2 and ".h." in name else gradient
        assert gradient.abs().max() > 0
        # Sums in another order, since Linear stands for Conv1D.
        assert relative_error(parameter.grad.numpy(), gradient.numpy()) < 1e-5, name


def test_scales_follow_the_weights() -> None:
    """However far a row grows, it is rounded by its own new scale, and not cut off at the old one."""
    model = new_model()
    prepared = new_model()
    qat.prepare(prepared)
    with torch.no_grad():
        for each in (model, prepared):
            each.transformer.wpe.weight[5] *= 40
            each.transformer.wte.weight[:7] *= 3
    assert relative_error(logits_of(prepared), logits_of(rounded_by_numpy(model))) < 1e-6


def test_training_moves_what_rounding_hides() -> None:
    """Steps far smaller than a step of int8 add up behind the rounding, and the loss falls."""
    model = new_model()
    qat.prepare(model)
    losses = learn(model, 30, weight_decay=0.0)
    assert losses[-1] < 0.7 * losses[0]


# --- the folder -------------------------------------------------------------------------------------------------------


def stored(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return {
        name.removeprefix("transformer."): tensor for name, tensor in load_file(folder / "model.safetensors").items()
    }


def test_the_stored_integers_are_those_that_the_model_computes_with(tied: bool, tmp_path: Path) -> None:
    """Of rows of all sizes, also of zeros and of numbers that ModelOpt takes for zeros."""
    model = new_model(tie_word_embeddings=tied, n_embd=192)
    with torch.no_grad():
        model.transformer.wpe.weight[3] = 0
        model.transformer.wpe.weight[4] *= 1e-9
        model.transformer.h[1].mlp.c_fc.weight[:, 5] = 0
    qat.prepare(model)
    qat.export(model, tmp_path)
    tensors = stored(tmp_path)
    count = 0
    for name, parameter in model.named_parameters():
        name = name.removeprefix("transformer.")
        if parameter.dim() != 2:
            np.testing.assert_array_equal(tensors[name], parameter.detach().numpy())
            assert tensors[name].dtype == np.float32
            continue
        weight = parameter.detach().numpy()
        largest = np.abs(weight).max(axis=1, keepdims=True)
        with np.errstate(divide="ignore"):
            integers = np.rint(weight * np.where(largest <= 2.0**-24, np.float32(0), np.float32(127) / largest))
        assert tensors[name].dtype == np.int8
        np.testing.assert_array_equal(tensors[name], integers)
        values = tensors[name] * tensors[f"{name}_scale"][:, None]
        np.testing.assert_allclose(values, int_fake_quantize(weight, largest), rtol=1e-6, atol=1e-12)
        count += 1
    assert count == 4 * 2 + (2 if tied else 3)
    assert ("lm_head.weight" in tensors) == (not tied), "a tied weight is stored once"


@pytest.mark.parametrize(
    ("tied", "dtype", "tolerance"), [(True, "float16", 5e-3), (False, "float16", 5e-3), (True, "float32", 1e-5)]
)
def test_the_folder_gives_the_trained_models_logits(tied: bool, tmp_path: Path, dtype: str, tolerance: float) -> None:
    model = new_model(tie_word_embeddings=tied)
    qat.prepare(model)
    learn(model, 3)
    expected = logits_of(model)
    qat.export(model, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    config = config_of(checkpoint, dtype)
    assert config.quant_mode == "int8-weight-only"
    assert config.quant_lm_head and config.quant_embedding and config.quant_position_embedding
    found = stateless_logits(load_model(checkpoint, config), IDS.numpy().astype(np.int32))
    assert relative_error(found, expected) <= tolerance


def test_training_goes_on_after_an_export(tmp_path: Path) -> None:
    model = new_model()
    qat.prepare(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = logits_of(model)
    qat.export(model, tmp_path / "one")
    qat.export(model, tmp_path / "two")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    np.testing.assert_array_equal(logits_of(model), logits)
    assert model.lm_head.weight is model.transformer.wte.weight
    for file in ("model.safetensors", "config.json", "hf_quant_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("pico_shakespeare_char", {"vocab_size": 65, "n_positions": 128, "n_layer": 3, "n_head": 4, "n_embd": 192}),
        ("tinystories_6x192", {"vocab_size": 65, "n_positions": 256, "n_layer": 6, "n_head": 6, "n_embd": 192}),
        ("checkpoints/shakespeare", {"vocab_size": 1024, "n_positions": 512, "n_layer": 4, "n_embd": 256}),
    ],
)
def test_full_int8_is_nearly_four_times_smaller(name: str, architecture: dict[str, int], tmp_path: Path) -> None:
    model = new_model(**architecture)
    model.save_pretrained(tmp_path / "float")
    qat.prepare(model)
    qat.export(model, tmp_path / "int8")
    before, after = (sum(f.stat().st_size for f in (tmp_path / w).glob("*.safetensors")) for w in ("float", "int8"))
    assert before / after >= 3.8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model that has learnt a little, with the tokenizer of bytes."""
    path = tmp_path_factory.mktemp("qat")
    random_checkpoint(path / "tokenizer")
    model = new_model()
    qat.prepare(model)
    learn(model, 20)
    qat.export(model, path / "int8")
    for file in weight_loader.TOKENIZER_FILES:
        if (path / "tokenizer" / file).is_file():
            shutil.copyfile(path / "tokenizer" / file, path / "int8" / file)
    return path / "int8"


def test_the_same_text_on_every_instruction_set(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    native = pytest.importorskip("nvtripy_portable._native", reason="the native executor is not built")
    import example
    from nvtripy_portable import interpreter
    from nvtripy_portable.plan import Plan

    run = interpreter.run

    def only_small_things(plan: Plan, inputs: list[np.ndarray]) -> list[np.ndarray]:
        assert not {"embedding", "quantized_rows", "linear"} & {step.kind for step in plan.steps}
        return list(run(plan, inputs))

    arguments = ["--model-type", str(folder), "--input-text", "Words, words", "--seed=1", "--max-new-tokens=40"]
    texts = set()
    for isa in native.available_isas():
        monkeypatch.setenv("NVTRIPY_PORTABLE_ISA", isa)
        monkeypatch.setattr(interpreter, "run", only_small_things)
        monkeypatch.setattr("sys.argv", ["example.py", *arguments])
        assert example.main() == 0
        texts.add(capfdbinary.readouterr().out)
    assert len(texts) == 1
    assert len(texts.pop()) > len("Words, words") + 10


# --- bad input --------------------------------------------------------------------------------------------------------


def test_what_is_quantized_already() -> None:
    model = new_model()
    qat.prepare(model)
    with pytest.raises(QuantizationError, match="expected a model that is not quantized yet but it is"):
        qat.prepare(model)


def test_what_has_not_been_prepared(tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match=r"expected a model that qat\.prepare has prepared"):
        qat.export(new_model(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(value: float, tmp_path: Path) -> None:
    model = new_model()
    with torch.no_grad():
        model.transformer.wpe.weight[3, 3] = value
    qat.prepare(model)
    with pytest.raises(QuantizationError, match=r"expected finite weights but transformer\.wpe\.weight holds"):
        qat.export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())

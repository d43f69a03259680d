"""gptq.py against the paper's algorithm as others wrote it, against a case worked by hand, and for its properties."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_model import save_random

from quantizing import gptq
from quantizing.gptq import GPTQError, Grid, Hessian
from quantizing.network import NETWORKS
from quantizing.torch_model import load_torch_model

LINEARS = tuple(name for group in NETWORKS["gpt2"].linears for name in group)

TOLERANCE = 1.01  # of another implementation's error: sums in another order turn a few weights the other way


def random_layer(
    seed: int, rows: int = 48, width: int = 192, tokens: int = 600
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight (rows, width), inputs (tokens, width) that are strongly correlated as activations are, and their H.

    Their covariance has eigenvalues from 1 down to about 1e-4, and some inputs are ten times larger than the others.
    """
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=random) * torch.logspace(0, -2, width)
    inputs = torch.randn(tokens, width, generator=random) @ mixing.T
    inputs *= 1 + 9 * (torch.rand(width, generator=random) > 0.95)
    weight = torch.randn(rows, width, generator=random) * torch.rand(rows, 1, generator=random)
    hessian = Hessian(width)
    hessian.add(inputs)
    return weight, inputs, hessian.matrix


def output_error(weight: torch.Tensor, quantized: torch.Tensor, inputs: torch.Tensor) -> float:
    """||(W - Q) X^T||^2, from the inputs themselves."""
    return float(((weight - quantized).double() @ inputs.double().T).square().sum())


# --- other implementations --------------------------------------------------------------------------------------------


def modelopts(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, scales: torch.Tensor) -> torch.Tensor:
    """NVIDIA ModelOpt's GPTQ (from left to right), on our grid."""
    calib_utils = pytest.importorskip(
        "modelopt.torch.quantization.utils.calib_utils", reason="nvidia-modelopt is not installed"
    )
    spread = scales.repeat_interleave(weight.shape[1] // scales.shape[1], dim=1)
    inverse = calib_utils.compute_hessian_inverse(hessian.float(), weight, gptq.DAMPING)
    result = weight.clone()
    calib_utils.gptq_blockwise_update(result, inverse, 64, lambda w: grid.nearest(w, spread) * spread)
    return result


def llmcompressors(
    weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, scales: torch.Tensor, act_order: bool
) -> torch.Tensor:
    """llm-compressor's GPTQ, the one behind vLLM's checkpoints, on our grid. See requirements/gptq-test.txt."""
    reason = "llmcompressor is not installed (requirements/gptq-test.txt)"
    compressor = pytest.importorskip("llmcompressor.modifiers.gptq.gptq_quantize", reason=reason, exc_type=ImportError)
    quantization = importlib.import_module("compressed_tensors.quantization")
    arguments = quantization.QuantizationArgs(
        num_bits=grid.bits,
        symmetric=True,
        strategy="channel" if grid.group_size is None else "group",
        group_size=grid.group_size,
        actorder="weight" if act_order else None,
    )
    result, _, _ = compressor.quantize_weight(
        weights=weight[None].clone(),
        hessians=hessian.float()[None].clone(),
        scale=scales[None],
        zero_point=torch.zeros_like(scales, dtype=torch.int8)[None],
        global_scale=None,
        quant_args=arguments,
        percdamp=gptq.DAMPING,
    )
    return result[0]


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [None, 32, 96])
@pytest.mark.parametrize("bits", gptq.BITS)
@pytest.mark.parametrize("seed", range(2))
def test_as_good_as_modelopts(seed: int, bits: int, group_size: int | None) -> None:
    weight, inputs, hessian = random_layer(seed)
    ours = gptq.quantize(weight, hessian, Grid(bits, group_size), act_order=False)
    theirs = modelopts(weight, hessian, Grid(bits, group_size), ours.scales)
    assert output_error(weight, ours.weight, inputs) <= TOLERANCE * output_error(weight, theirs, inputs)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [None, 32, 96])
@pytest.mark.parametrize("bits", gptq.BITS)
@pytest.mark.parametrize("seed", range(2))
def test_as_good_as_llmcompressors(seed: int, bits: int, group_size: int | None, act_order: bool) -> None:
    weight, inputs, hessian = random_layer(seed)
    ours = gptq.quantize(weight, hessian, Grid(bits, group_size), act_order=act_order)
    theirs = llmcompressors(weight, hessian, Grid(bits, group_size), ours.scales, act_order)
    assert output_error(weight, ours.weight, inputs) <= TOLERANCE * output_error(weight, theirs, inputs)


# --- properties -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_searched", [False, True])
@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("bits", gptq.BITS)
def test_never_above_roundings(bits: int, group_size: int | None, is_searched: bool) -> None:
    """And much below it where there are few integers; errors are what a product with the inputs gives, too."""
    weight, inputs, hessian = random_layer(7)
    grid = Grid(bits, group_size, is_searched)
    compensated, rounded = gptq.quantize(weight, hessian, grid), gptq.quantize(weight, None, grid)
    error, of_rounding = (output_error(weight, each.weight, inputs) for each in (compensated, rounded))
    assert error <= of_rounding * (1 if bits == 8 else 0.6)
    power = output_error(weight, torch.zeros_like(weight), inputs)
    assert compensated.error == pytest.approx(error / power, rel=1e-4)
    assert compensated.rounding_error == pytest.approx(of_rounding / power, rel=1e-4)
    # Row by row as well.
    for row in range(len(weight)):
        part = slice(row, row + 1)
        least = output_error(weight[part], rounded.weight[part], inputs)
        assert output_error(weight[part], compensated.weight[part], inputs) <= least * (1 + 1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
@pytest.mark.parametrize("bits", gptq.BITS)
def test_inputs_without_correlation_leave_rounding_to_nearest(bits: int, scale: float) -> None:
    weight, _, _ = random_layer(1)
    width = weight.shape[1]
    for diagonal in (torch.ones(width), torch.rand(width, generator=torch.Generator().manual_seed(0)) + 0.1):
        hessian = torch.diag(diagonal).double() * scale
        compensated = gptq.quantize(weight, hessian, Grid(bits, 64))
        rounded = gptq.quantize(weight, None, Grid(bits, 64))
        assert torch.equal(compensated.integers, rounded.integers)
        assert compensated.error == compensated.rounding_error


def test_two_weights_by_hand() -> None:
    """W = (3, 1.4) at a scale of 1 (its largest is 3 in int3), H = ((2, 1), (1, 1)) without damping.

    Columns go by decreasing diagonal: first 3, which is on the grid and loses nothing; then 1.4 becomes 1. With
    W = (2.4, 3) the first becomes 2 and loses 0.4. The best that the second can do is to grow by
    0.4 * H[0, 1] / H[1, 1] = 0.4, to 3.4, which is 3 again, at its scale of 1: the error is
    0.4^2 * 2 = 0.32. With W = (2.4, 2.2) and a scale of 1 it grows to 2.6, and is rounded to 3 instead of 2. So
    (2, 3) has the error 2 * 0.4^2 + 2 * 0.4 * -0.8 + 0.8^2 = 0.32, where rounding, (2, 2), has
    2 * 0.4^2 + 2 * 0.4 * 0.2 + 0.2^2 = 0.52.
    """
    hessian = torch.tensor([[2.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    weight = torch.tensor([[3.0, 1.4, 0.0], [2.4, 3.0, 0.0], [2.4, 2.2, 3.0]])
    with_third = torch.zeros(3, 3, dtype=torch.float64)  # a column that sets the scale, of inputs that do nothing
    with_third[:2, :2] = hessian
    with_third[2, 2] = 1e-9
    layer = gptq.quantize(weight, with_third, Grid(3), damping=1e-12)
    assert layer.scales.tolist() == [[1.0]] * 3
    assert layer.integers.tolist() == [[3, 1, 0], [2, 3, 0], [2, 3, 3]]
    assert gptq.quantize(weight, None, Grid(3)).integers.tolist() == [[3, 1, 0], [2, 3, 0], [2, 2, 3]]
    total = torch.tensor([0.4**2, 0.32, 0.32]).sum() / gptq.output_errors(weight, with_third).sum()
    assert layer.error == pytest.approx(float(total), rel=1e-5)


def test_the_factor_is_of_the_inverse_of_what_is_left() -> None:
    """Row i of U is the first row of (H without the columns before i)^-1 over the root of its first element."""
    _, _, hessian = random_layer(2, width=24)
    hessian = hessian + torch.eye(24) * 1e-2 * hessian.diagonal().mean()
    upper = gptq.inverse_cholesky(hessian)
    assert torch.equal(upper, upper.triu())
    for i in range(24):
        left = torch.linalg.inv(hessian[i:, i:])
        torch.testing.assert_close(upper[i, i:], left[0] / left[0, 0].sqrt(), rtol=1e-6, atol=1e-12)


def test_lazy_updates_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs, hessian = random_layer(3)
    errors = []
    for columns in (1, 7, 128, 1000):
        monkeypatch.setattr(gptq, "LAZY_COLUMNS", columns)
        errors.append(output_error(weight, gptq.quantize(weight, hessian, Grid(4)).weight, inputs))
    # Sums in another order turn a few weights that are nearly half-way the other way.
    assert max(errors) <= 1.01 * min(errors)


def test_act_order_is_the_order_of_the_columns() -> None:
    """Permuting columns of weight and inputs permutes the result."""
    weight, _, hessian = random_layer(4)
    order = torch.randperm(192, generator=torch.Generator().manual_seed(0))
    straight = gptq.quantize(weight, hessian, Grid(4))
    permuted = gptq.quantize(weight[:, order], hessian[order][:, order], Grid(4))
    assert torch.equal(straight.integers[:, order], permuted.integers)


def test_act_order_pays_where_some_inputs_are_large() -> None:
    weight, inputs, hessian = random_layer(5)
    ordered, as_is = (gptq.quantize(weight, hessian, Grid(3), act_order=each) for each in (True, False))
    assert output_error(weight, ordered.weight, inputs) < output_error(weight, as_is.weight, inputs)


@pytest.mark.parametrize("bits", gptq.BITS)
def test_integers_and_scales_are_of_the_grid(bits: int) -> None:
    weight, _, hessian = random_layer(6)
    weight[3] = 0
    weight[4, :64] = 0
    for group_size, groups in ((None, 1), (64, 3), (192, 1), (1, 192)):
        layer = gptq.quantize(weight, hessian, Grid(bits, group_size))
        assert layer.integers.dtype == torch.int8 and layer.integers.shape == weight.shape
        assert layer.scales.shape == (48, groups) and (layer.scales > 0).all()
        assert int(layer.integers.min()) >= -(2 ** (bits - 1)) and int(layer.integers.max()) < 2 ** (bits - 1)
        assert (layer.weight[3] == 0).all()


def test_a_searched_grid_has_no_larger_error() -> None:
    weight, _, _ = random_layer(8)
    weight[:, 5] *= 4  # an outlier in each row
    full, searched = (gptq.quantize(weight, None, Grid(3, None, each)).weight for each in (False, True))
    errors = [(weight - each).square().sum(dim=1) for each in (full, searched)]
    assert (errors[1] <= errors[0]).all() and errors[1].sum() < 0.7 * errors[0].sum()


def test_inputs_that_are_always_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their weights are rounded, not lost: other text than the calibration's may need them."""
    weight, inputs, _ = random_layer(9)
    inputs[:, [0, 17, 191]] = 0
    hessian = Hessian(192)
    hessian.add(inputs)
    layer = gptq.quantize(weight, hessian.matrix, Grid(4))
    rounded = gptq.quantize(weight, None, Grid(4))
    assert torch.equal(layer.integers[:, [0, 17, 191]], rounded.integers[:, [0, 17, 191]])
    assert output_error(weight, layer.weight, inputs) < 0.6 * output_error(weight, rounded.weight, inputs)


@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_singular_hessians(tokens: int) -> None:
    """Fewer calibration tokens than input features, or none: finite, on the grid, and no worse than rounding."""
    weight, inputs, _ = random_layer(10, tokens=max(tokens, 1))
    hessian = Hessian(192)
    hessian.add(inputs[:tokens])
    layer = gptq.quantize(weight, hessian.matrix, Grid(4))
    assert layer.weight.isfinite().all() and layer.error <= layer.rounding_error
    if tokens == 0:
        assert torch.equal(layer.integers, gptq.quantize(weight, None, Grid(4)).integers)


# --- bad input --------------------------------------------------------------------------------------------------------


def with_(value: float, like: torch.Tensor) -> torch.Tensor:
    result = like.clone()
    result[2, 3] = value
    return result


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda w, h: Grid(5), "expected 8, 4, 3 bits but got 5"),
        (lambda w, h: Grid(4, 0), "a group of at least 1 input feature but got 0"),
        (
            lambda w, h: gptq.quantize(w, h, Grid(4, 128), name="h.3.mlp.c_fc"),
            "divides the 192 input features of h.3.mlp.c_fc but got 128",
        ),
        (lambda w, h: gptq.quantize(w, with_(torch.nan, h), Grid(4), name="h.0.x"), "inputs of h.0.x .* holds nan"),
        (lambda w, h: gptq.quantize(w, with_(torch.inf, h), Grid(4), name="h.0.x"), "inputs of h.0.x .* holds inf"),
        (lambda w, h: gptq.quantize(with_(-torch.inf, w), h, Grid(4), name="h.0.x"), "weights in h.0.x but got -inf"),
        (lambda w, h: gptq.quantize(w, -h, Grid(4), name="h.0.x"), "a positive definite Hessian of h.0.x"),
    ],
)
def test_what_cannot_be_quantized(attempt: Callable[[torch.Tensor, torch.Tensor], Any], message: str) -> None:
    weight, _, hessian = random_layer(0)
    with pytest.raises(GPTQError, match=message):
        attempt(weight, hessian)


# --- the whole model --------------------------------------------------------------------------------------------------


def test_layers_see_what_the_quantized_ones_before_them_give(tmp_path: Path) -> None:
    """Each layer's result is that of its inputs in a model whose earlier layers, and no others, are quantized."""
    save_random(tmp_path, n_layer=2, n_head=4, n_embd=64, vocab_size=160, n_positions=24)
    model = load_torch_model(tmp_path)
    floats = copy.deepcopy(model)
    random = torch.Generator().manual_seed(0)
    batches = [torch.randint(160, (size, 24), generator=random) for size in (4, 4, 1)]
    layers = gptq.quantize_layers(model, Grid(3, 32), batches)
    names = [f"h.{block}.{linear}" for block in range(2) for linear in LINEARS]
    assert [layer.name for layer in layers] == names
    partly = copy.deepcopy(floats)
    for layer in layers:
        module = partly.transformer.get_submodule(layer.name)
        inputs: list[torch.Tensor] = []
        hook = module.register_forward_pre_hook(lambda _, given, inputs=inputs: inputs.append(given[0].detach()))
        with torch.no_grad():
            for batch in batches:
                partly(batch, use_cache=False)
        hook.remove()
        hessian = Hessian(module.weight.shape[0])
        for each in inputs:
            hessian.add(each)
        expected = gptq.quantize(module.weight.detach().T, hessian.matrix, Grid(3, 32))
        assert torch.equal(layer.scales, expected.scales)
        # The last bit of a sum turns a weight that is nearly half-way the other way, and then those after it.
        assert (layer.integers == expected.integers).float().mean() > 0.97
        assert layer.error == pytest.approx(expected.error, rel=1e-2)
        module.weight.data = layer.weight.T.contiguous()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, partly.get_parameter(name)), name


def test_without_text_the_layers_are_rounded(tmp_path: Path) -> None:
    save_random(tmp_path, n_layer=1, n_head=4, n_embd=64, vocab_size=160, n_positions=24)
    model = load_torch_model(tmp_path)
    weights = {linear: model.transformer.h[0].get_submodule(linear).weight.detach().T.clone() for linear in LINEARS}
    for layer, weight in zip(gptq.quantize_layers(model, Grid(4), None), weights.values(), strict=True):
        assert torch.equal(layer.integers, gptq.quantize(weight, None, Grid(4)).integers)

"""GPTQ: a model's linear layers on integer grids, by rounding that makes up for its own errors.

Frantar, Ashkboos, Hoefler, Alistarh 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (arXiv:2210.17323). A linear layer with weights W (out, in) is quantized so that its outputs on
calibration inputs X (tokens, in) stay as they are, not its weights: it looks for integers and scales that make

    || (W - Q) X^T ||^2  =  sum over rows of (w - q) H (w - q)^T,    H = X^T X

small. Rows do not matter to each other, and all of them share H. The columns are rounded one after another; what the
rounding of a column does to the outputs is made up for, as far as it can be, by the columns that are not rounded yet.

`rtn` is rounding to nearest: the same grids, and each weight to the integer next to it.

The way of the data: calibration samples → for each linear layer, in the order of the forward pass: the inputs that the
layers quantized before it give it → `Hessian` → `scales_of` → `quantize` → weights on the grid, for the next layer.

Names are the paper's where it has them. torch only; transformers' models in `quantize_layers`, and nowhere else.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from quantizing.network import network_of, rows_of

BITS = (8, 4, 3)
LAZY_COLUMNS = 128  # B in the paper: columns whose updates to all the later ones are collected first
DAMPING = 0.01  # lambda in the paper: this share of the mean of H's diagonal is added to the diagonal
CLIPPING = tuple(1 - 0.02 * step for step in range(26))  # of the largest magnitude, that a searched grid may span


class GPTQError(Exception):
    """A layer cannot be quantized as asked. The text is one line, ready to be shown to the user."""


# ---------------------------------------------------------------------------------------------------------------------
# Grids
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Symmetric integers: -2^(bits-1) to 2^(bits-1) - 1, and a scale for each group of input features of each row.

    Attributes:
        bits: 8, 4 or 3.
        group_size: Neighbouring input features that share a scale. None: a row has one.
        is_searched: Each scale is that of `CLIPPING`'s candidates with the least squared error of the weights, instead
            of the one that just holds the largest weight. It pays where there are few integers: an outlier is clipped
            so that all others are rounded finer.

    Raises:
        GPTQError: bits that are none of `BITS`, or a group that is not positive.
    """

    bits: int
    group_size: int | None = None
    is_searched: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise GPTQError(f"expected {', '.join(map(str, BITS))} bits but got {self.bits}")
        if self.group_size is not None and self.group_size < 1:
            raise GPTQError(f"expected a group of at least 1 input feature but got {self.group_size}")

    @property
    def smallest(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def largest(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def nearest(self, weights: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The integers next to weights / scales, as floats, ties to even."""
        return (weights / scales).round_().clamp_(self.smallest, self.largest)

    def groups(self, width: int, name: str = "the layer") -> int:
        """How many scales a row of ``width`` input features has.

        Raises:
            GPTQError: the group does not divide the width.
        """
        if self.group_size is None:
            return 1
        if width % self.group_size:
            raise GPTQError(
                f"expected a group size that divides the {width} input features of {name} but got {self.group_size}"
            )
        return width // self.group_size


def scales_of(weight: torch.Tensor, grid: Grid, name: str = "the layer") -> torch.Tensor:
    """The grid's scales for a weight: (out, in) → (out, groups) float32, all positive.

    They are set before any column is rounded and stay: act-order visits the columns of all groups in turn, so there is
    no moment at which a group's weights, with what has been added to them by then, could be looked at.

    Raises:
        GPTQError: the group does not divide the width, or there are weights that are not finite numbers.
    """
    if not weight.isfinite().all():
        raise GPTQError(f"expected finite weights in {name} but got {_first_not_finite(weight)}")
    rows, width = weight.shape
    grouped = weight.float().reshape(rows, grid.groups(width, name), -1)
    full = grouped.abs().amax(dim=2) / grid.largest
    full = torch.where(full > 0, full, torch.ones_like(full))  # of zeros any scale will do
    if not grid.is_searched:
        return full
    best, least = full, torch.full_like(full, torch.inf)
    for share in CLIPPING:
        scales = full * share
        rounded = grid.nearest(grouped, scales[:, :, None]) * scales[:, :, None]
        error = (rounded - grouped).square_().sum(dim=2)
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return best


# ---------------------------------------------------------------------------------------------------------------------
# The algorithm, for one layer
# ---------------------------------------------------------------------------------------------------------------------


class Hessian:
    """H = X^T X, (in, in), added up over calibration batches. The paper's factor of 2 cancels everywhere."""

    def __init__(self, width: int) -> None:
        self.matrix = torch.zeros(width, width, dtype=torch.float64)

    def add(self, inputs: torch.Tensor) -> None:
        """Takes the inputs of a batch, (..., in)."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self.matrix += (rows.T @ rows).double()


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer on its grid.

    Attributes:
        name: The layer's, as HuggingFace has it without "transformer.".
        integers: (out, in) int8.
        scales: (out, groups) float32.
        error: ||(W - Q) X^T||^2 / ||W X^T||^2 on the calibration inputs; NaN without any.
        rounding_error: The same of rounding to nearest.
    """

    name: str
    integers: torch.Tensor
    scales: torch.Tensor
    error: float
    rounding_error: float

    @property
    def weight(self) -> torch.Tensor:
        """What the integers stand for, (out, in) float32."""
        return self.integers * _spread(self.scales, self.integers.shape[1])


def quantize(
    weight: torch.Tensor,
    hessian: torch.Tensor | None,
    grid: Grid,
    *,
    act_order: bool = True,
    damping: float = DAMPING,
    name: str = "the layer",
) -> QuantizedLayer:
    """One layer by GPTQ, or by rounding to nearest where there is no Hessian.

    Args:
        weight: (out, in), floats.
        hessian: `Hessian.matrix`, (in, in) float64, or None.
        act_order: Columns are rounded in the order of decreasing diagonal elements of H, the largest inputs first,
            while there are many columns left that can make up for them; else from left to right.
        damping: A share of the mean diagonal element that is added to the diagonal, so that H can be inverted.

    A row whose outputs rounding to nearest would serve better (it happens at 8 bits, when damping is what decides) is
    rounded, so no error is ever above rounding's.

    Raises:
        GPTQError: weights or Hessian are not finite numbers, or the group does not divide the width.
    """
    weight = weight.detach().float()
    scales = scales_of(weight, grid, name)
    rounded = grid.nearest(weight, _spread(scales, weight.shape[1]))
    if hessian is None:
        return QuantizedLayer(name, rounded.to(torch.int8), scales, torch.nan, torch.nan)
    if not hessian.isfinite().all():
        raise GPTQError(
            f"expected finite inputs of {name} in calibration but its Hessian holds {_first_not_finite(hessian)}"
        )
    compensated = _compensated(weight, hessian, scales, grid, act_order, damping, name)

    def errors(integers: torch.Tensor) -> torch.Tensor:
        return output_errors(weight - integers * _spread(scales, weight.shape[1]), hessian)

    of_rounding, of_compensation = errors(rounded), errors(compensated)
    integers = torch.where((of_compensation <= of_rounding)[:, None], compensated, rounded)
    total = output_errors(weight, hessian).sum()
    error = torch.minimum(of_compensation, of_rounding).sum()
    relative = [float(each / total) if total > 0 else 0.0 for each in (error, of_rounding.sum())]
    return QuantizedLayer(name, integers.to(torch.int8), scales, relative[0], relative[1])


def output_errors(difference: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """||d X^T||^2 = d H d^T of each row d of a difference between weights: (out, in), (in, in) → (out,) float64."""
    wide = difference.double()
    return ((wide @ hessian) * wide).sum(dim=1).clamp_(min=0)


def _compensated(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scales: torch.Tensor,
    grid: Grid,
    act_order: bool,
    damping: float,
    name: str,
) -> torch.Tensor:
    """Algorithm 1 of the paper: the integers, (out, in), as floats."""
    rows, width = weight.shape
    diagonal = hessian.diagonal()
    # A column of inputs that are always zero has neither a diagonal element nor others: damping gives it one, and then
    # it is rounded to nearest, for nothing is known that would be better.
    damped = hessian + torch.eye(width, dtype=torch.float64) * (damping * float(diagonal.mean()) or 1.0)
    order = diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(width)
    upper = inverse_cholesky(damped[order][:, order], name).float()
    weight = weight[:, order].clone()
    scale_of_column = _spread(scales, width)[:, order]

    integers = torch.empty_like(weight)
    for begin in range(0, width, LAZY_COLUMNS):
        end = min(begin + LAZY_COLUMNS, width)
        errors = torch.empty(rows, end - begin)
        for column in range(begin, end):
            own = weight[:, column]
            integers[:, column] = grid.nearest(own, scale_of_column[:, column])
            lost = own - integers[:, column] * scale_of_column[:, column]
            error = lost / upper[column, column]
            # Equation 3: what the other columns of the block have to make up for.
            weight[:, column:end] -= error[:, None] * upper[column, column:end]
            errors[:, column - begin] = error
        # Lazy updates: the columns beyond the block get everything at once, in one matrix product.
        weight[:, end:] -= errors @ upper[begin:end, end:]
    return integers[:, order.argsort()]


def inverse_cholesky(matrix: torch.Tensor, name: str = "the layer") -> torch.Tensor:
    """U with U^T U = matrix^-1, upper triangular: (n, n) float64, positive definite → (n, n) float64.

    Row i of U, from the diagonal on, is what the paper's step needs of the inverse of H without the columns before i
    (its section "Step 3: Cholesky Reformulation"), but for a factor: H^-1[i, i:] / sqrt(H^-1[i, i]).

    Raises:
        GPTQError: it is not positive definite, in spite of the damping.
    """
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        raise GPTQError(f"expected a positive definite Hessian of {name}: try more damping or more calibration text")
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed:
        raise GPTQError(f"expected an invertible Hessian of {name}: try more damping or more calibration text")
    return upper


def _spread(scales: torch.Tensor, width: int) -> torch.Tensor:
    """Each group's scale for each of its input features: (out, groups) → (out, in)."""
    return scales.repeat_interleave(width // scales.shape[1], dim=1)


def _first_not_finite(values: torch.Tensor) -> float:
    return float(values[~values.isfinite()][0])


# ---------------------------------------------------------------------------------------------------------------------
# The whole model, layer by layer
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def quantize_layers(
    model: Any,
    grid: Grid,
    batches: Sequence[torch.Tensor] | None,
    *,
    act_order: bool = True,
    damping: float = DAMPING,
) -> list[QuantizedLayer]:
    """Puts the linear layers of every block of a model on a grid, in the order of the forward pass.

    A layer is calibrated on what reaches it when everything before it is quantized, the layers of its own block too
    (section "Additional Information" of the paper; what its code calls "true sequential").

    Args:
        model: One of transformers' (network.py), in float32. Its weights become those that the integers stand for.
        batches: Calibration samples for GPTQ, each (samples, tokens) int64; None to round to nearest.

    Returns:
        The layers, named "h.0.attn.c_attn" and so on, or as the family names them.

    Raises:
        GPTQError: a layer cannot be quantized; the message names it.
    """
    layers: list[QuantizedLayer] = []
    network = network_of(model)
    blocks = list(network.blocks_of(model))
    calls = None if batches is None else list(_calls_of_first_block(model, batches))
    total = len(blocks) * sum(map(len, network.linears))
    description = "rounding" if calls is None else "GPTQ"
    with tqdm(desc=description, total=total, unit="layer", file=sys.stderr) as progress:
        for number, block in enumerate(blocks):
            for group in network.linears:
                hessian = None if calls is None else _observe(block, block.get_submodule(group[0]), calls)
                for linear in group:
                    name = f"{network.blocks}.{number}.{linear}"
                    weight = rows_of(block.get_submodule(linear))
                    layer = quantize(weight, hessian, grid, act_order=act_order, damping=damping, name=name)
                    weight.copy_(layer.weight)
                    layers.append(layer)
                    errors = {} if hessian is None else {"error": f"{layer.error:.1e}"}
                    progress.set_postfix(layer=name, **errors, refresh=False)
                    progress.update()
            for call in calls or ():
                call.hidden = call.run(block)
    return layers


@dataclass
class _Call:
    """The arguments of a block's forward for one batch: what comes from the block before, and all the rest."""

    hidden: torch.Tensor  # (samples, tokens, E)
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def run(self, block: Any) -> torch.Tensor:
        output = block(self.hidden, *self.arguments, **self.keywords)
        return output[0] if isinstance(output, tuple) else output


class _Enough(Exception):
    """Ends a forward pass of which only the beginning is wanted."""


def _calls_of_first_block(model: Any, batches: Sequence[torch.Tensor]) -> Iterator[_Call]:
    """What the model's forward gives its first block for each batch."""
    caught: list[_Call] = []

    def catch(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        caught.append(_Call(arguments[0], arguments[1:], keywords))
        raise _Enough

    network = network_of(model)
    hook = network.blocks_of(model)[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for batch in batches:
            try:
                network.body_of(model)(batch, use_cache=False)
            except _Enough:
                yield caught.pop()
    finally:
        hook.remove()


def _observe(block: Any, module: Any, calls: Sequence[_Call]) -> torch.Tensor:
    """The Hessian of one linear layer of a block."""
    hessian = Hessian(rows_of(module).shape[1])

    def look(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        hessian.add(arguments[0])
        raise _Enough

    hook = module.register_forward_pre_hook(look)
    try:
        for call in calls:
            try:
                call.run(block)
            except _Enough:
                continue
    finally:
        hook.remove()
    return hessian.matrix

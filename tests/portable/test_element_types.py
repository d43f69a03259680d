"""Element types with nvtripy's own checks switched off: for every combination, each of nvtripy's operations either
gives what it promises, or the layers below refuse.

The operations are those that nvtripy registers with their requirements and guarantees. What nvtripy requires it tests
against TensorRT itself, in both directions; so what it allows has to run here, and what it does not either raises or
keeps the promise.
"""

from __future__ import annotations

import inspect
import itertools
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import nvtripy as tp
import pytest
from nvtripy.common.datatype import DATA_TYPES
from nvtripy.frontend.wrappers import OPERATOR_CONSTRAINTS, OperatorConstraints
from nvtripy.utils.types import str_from_type_annotation

#: Arguments that are no tensors, or of another shape than (1, 2, 4, 4): a text is a tensor of that shape.
WINDOWS = {"stride": (1, 1), "padding": ((0, 0), (0, 0)), "groups": 1, "dilation": (1, 1)}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "__getitem__": {"index": 0},
    "arange": {"start": 0, "stop": 8, "step": 1},
    "avgpool": {"kernel_dims": (2, 2)},
    "concatenate": {"dim": 1},
    "convolution": {"weight": "2 2 3 3", "bias": "2", **WINDOWS},
    "copy": {"device": tp.device("cpu")},
    "cumsum": {"dim": 1},
    "deconvolution": {"weight": "2 2 3 3", "bias": "2", **WINDOWS},
    "dequantize": {"scale": "2", "dim": 1},
    "expand": {"sizes": (2, 2, 4, 4)},
    "full": {"shape": (2, 2), "value": ""},
    "full_like": {"value": ""},
    "gather": {"dim": 1, "index": "1"},
    "instancenorm": {"weight": "2", "bias": "2", "num_channels": 2, "eps": 1e-5},
    "iota": {"shape": (2, 2)},
    "layernorm": {"weight": "4", "bias": "4", "eps": 1e-5},
    "masked_fill": {"value": 1},
    "maxpool": {"kernel_dims": (2, 2)},
    "ones": {"shape": (2, 2)},
    "outer": {"vec1": "3", "vec2": "4"},
    "pad": {"pad": ((0, 1), (1, 0), (1, 1), (0, 0))},
    "permute": {"perm": (1, 0, 3, 2)},
    "quantize": {"scale": "2", "dim": 1},
    "repeat": {"repeats": 2, "dim": 0},
    "reshape": {"shape": (4, 8)},
    "split": {"num_split_or_sizes": 2, "dim": 1},
    "squeeze": {"dims": 0},
    "topk": {"k": 2, "dim": 3},
    "transpose": {"dim0": 0, "dim1": 1},
    "unsqueeze": {"dim": 0},
    "zeros": {"shape": (2, 2)},
}
#: One of two overloads, which their arguments tell apart.
OVERLOADS = {"output_shape": (1, 2, 8, 8), "scales": (1, 1, 2, 2)}
#: Errors that no layer means to raise.
INTERNAL = (
    "AssertionError",
    "AttributeError",
    "IndexError",
    "KeyError",
    "NameError",
    "NotImplementedError",
    "TypeError",
    "UnboundLocalError",
    "ValueError",
    "ZeroDivisionError",
)


def typed_parameters(function: Callable[..., Any]) -> list[str]:
    """The parameters that take a tensor or a type."""
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        text = str_from_type_annotation(parameter.annotation)
        is_index = name in ARGUMENTS.get(function.__name__, {}) and isinstance(ARGUMENTS[function.__name__][name], int)
        if ("Tensor" in text or "nvtripy.dtype" in text) and not is_index:
            found.append(name)
    return found


@cache
def tensor(shape: tuple[int, ...], dtype: tp.dtype) -> tp.Tensor:
    """Ones, as a constant; those of a type that NumPy lacks are computed."""
    values = np.ones(shape, np.float32)
    if dtype in (tp.float8, tp.int4):
        return tp.quantize(tp.Tensor(values if shape else values.reshape(1)), 1.0, dtype)
    if dtype == tp.bfloat16:
        return tp.copy(tp.cast(tp.Tensor(values), dtype), tp.device("cpu"))
    return tp.Tensor(values.astype(np.dtype("bool" if dtype == tp.bool else dtype.name)))


def arguments(function: Callable[..., Any], types: dict[str, tp.dtype]) -> dict[str, Any]:
    given = ARGUMENTS.get(function.__name__, {})
    result: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        value = given.get(name, OVERLOADS.get(name))
        text = str_from_type_annotation(parameter.annotation)
        if name in types and "nvtripy.dtype" in text:
            result[name] = types[name]
        elif name in types:
            shape = tuple(map(int, value.split())) if isinstance(value, str) else (1, 2, 4, 4)
            result[name] = tensor(shape, types[name])
            if "Sequence[nvtripy.Tensor]" in text:
                result[name] = [result[name]] * 2
        elif value is not None:
            result[name] = value
    return result


def combinations(constraints: OperatorConstraints) -> Iterator[dict[str, tp.dtype]]:
    names = typed_parameters(constraints.func)
    for types in itertools.product(DATA_TYPES.values(), repeat=len(names)):
        yield dict(zip(names, types, strict=True))


def check(constraints: OperatorConstraints, types: dict[str, tp.dtype]) -> str | None:
    """What is wrong with an operation on operands of given types."""
    function = constraints.func
    given = arguments(function, types)
    bound = inspect.signature(function).bind(**given)
    bound.apply_defaults()
    every = list(bound.arguments.items())
    is_valid = constraints.input_requirements is None or bool(constraints.input_requirements(every))
    try:
        public = getattr(sys.modules[function.__module__], function.__name__)  # with nvtripy's conversions around it
        function = public.fget if isinstance(public, property) else public
        results = function(**given)
        results = tuple(results) if isinstance(results, (list, tuple)) else (results,)
        for each in results:
            if isinstance(each, tp.Tensor):
                each.eval()
    except Exception as error:
        # What nvtripy allows of int4 it cannot test: it has no way to make such inputs.
        return explained(error, is_valid and tp.int4 not in types.values() and not is_refused(function.__name__, given))
    if constraints.output_guarantees is not None and not constraints.output_guarantees(every, results):
        return f"promised {constraints.output_guarantees} but gave {[each.dtype for each in results]}"
    return None


def is_refused(name: str, given: dict[str, Any]) -> bool:
    """Whether TensorRT refuses what nvtripy allows: float8 has no scales along an axis."""
    float8 = given["input"].dtype if name == "dequantize" else given.get("dtype")
    return name in ("quantize", "dequantize") and float8 == tp.float8


def explained(error: Exception, must_run: bool) -> str | None:
    """What is wrong with an error: nothing, where nvtripy or the verifier refuses what it may refuse."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    if must_run or not re.search(r"[/\\]nvtripy[/\\]", last):
        return f"{type(error).__name__} in {last}: {text}"
    # nvtripy wraps whatever stops the layers below in its own exception, with the name of that before its text.
    return text if re.search(rf"\b({'|'.join(INTERNAL)}): ", text) else None


@pytest.mark.slow
@pytest.mark.parametrize("constraints", OPERATOR_CONSTRAINTS, ids=lambda each: each.func.__name__)
def test_element_types(constraints: OperatorConstraints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tp.config, "enable_input_validation", False)
    wrong = {}
    for types in combinations(constraints):
        fault = check(constraints, types)
        if fault is not None:
            wrong[", ".join(f"{name}: {dtype}" for name, dtype in types.items())] = fault
    assert not wrong

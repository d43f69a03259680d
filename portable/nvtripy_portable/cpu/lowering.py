"""From a graph of fused operations to a native program."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nvtripy_portable import fused
from nvtripy_portable.cpu import native, tuning
from nvtripy_portable.cpu.plugin_forms import is_value, plugin_form
from nvtripy_portable.graph import DTYPES, Graph, Operation, Value
from nvtripy_portable.interpreter import where
from nvtripy_portable.plugins import PluginError, calling

_FLOATS = ("f32", "f16", "bf16")
_CACHES = ("f32", "f16", "bf16", "i8")
_MOST_RANK = 1024  # of an adapter: csrc/kernels.h
_INTEGER_BLOCK = 32  # weights that share a scale in integer products: a multiple of this


@dataclass
class Output:
    """What the executor makes of one output of the graph: a cache (its number), or an array of ``dtype``.

    An array has the first ``leading`` dimensions of the graph's input number ``source``, then ``width``.
    """

    cache: int | None = None
    dtype: np.dtype = field(default_factory=lambda: np.dtype(np.float32))
    source: int = 0
    leading: int = 0
    width: int = 0


@dataclass
class Lowered:
    """A native program and how the graph's inputs and outputs go into it, by their numbers."""

    program: Any
    integers: list[int]
    floats: list[int]
    caches: list[int]
    tables: list[int]  # of adapters and of prompts' rows
    positions: list[int]  # for each cache, which input says where it is written
    lengths: list[tuple[int, int]]  # and which dimension of which input says how many rows
    outputs: list[Output]
    location: str  # of the operation that looks indices up
    plugins: list[Any]  # what keeps native functions where they are
    takes_any_rows: bool  # whether nothing but attention tells one sequence from another


class _CannotRun(Exception):
    """The graph holds something that the program cannot do."""


def lower(graph: Graph, module: Any) -> Lowered | None:
    """The program for ``graph``, or None where it cannot run natively.

    Args:
        graph: Its weights are used where they are: they must not change.
        module: ``nvtripy_portable._native``.

    Raises:
        ValueError: ``NVTRIPY_PORTABLE_ISA`` asks for an instruction set that the CPU lacks, or
            ``NVTRIPY_PORTABLE_PREFETCH`` is no policy.
    """
    if not is_fused(graph):
        return None
    try:
        return _Lowering(graph).finish(module)
    except _CannotRun:
        return None


def is_fused(graph: Graph) -> bool:
    """Whether a graph has no operations but fused ones and plug-ins."""
    kinds = {operation.kind for operation in graph.operations} - {"constant"}
    return bool(kinds) and kinds <= {*fused.OPERATIONS, "plugin"}


def _require(condition: bool) -> None:
    if not condition:
        raise _CannotRun


class _Lowering:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.inputs = {entry.value: index for index, entry in enumerate(graph.inputs)}
        self.uses = _uses(graph)
        self.values: dict[Value, int] = {}  # float values by their number in the program
        self.widths: list[int] = []
        self.leading: dict[Value, tuple[int, int]] = {}
        self.integers: list[int] = []
        self.floats: list[int] = []
        self.caches: list[int] = []
        self.tables: list[int] = []
        self.cache_of: dict[Value, int] = {}  # every version of a cache
        self.newest: dict[int, Value] = {}
        self.positions: list[int] = []
        self.lengths: list[tuple[int, int]] = []
        self.forms: list[dict[str, Any]] = []
        self.norms: dict[Value, Operation] = {}  # that the one linear operation after them does
        self.frequencies: dict[bytes, np.ndarray] = {}
        self.location = ""
        self.plugins: list[Any] = []
        self.takes_any_rows = True
        for operation in graph.operations:
            if operation.kind != "constant":
                getattr(self, f"_{operation.kind}")(operation)

    def finish(self, module: Any) -> Lowered:
        outputs = []
        for value in self.graph.outputs:
            if value in self.cache_of:
                number = self.cache_of[value]
                _require(self.newest[number] is value)
                outputs.append(Output(cache=number))
            else:
                _require(value in self.values and value not in self.inputs)
                source, leading = self.leading[value]
                width = self.widths[self.values[value]]
                outputs.append(Output(None, DTYPES[value.type.dtype], source, leading, width))
        _require(len(set(self.graph.outputs)) == len(outputs))
        _require(len([each for each in outputs if each.cache is not None]) == len(self.caches))
        arrays = [value for value in self.graph.outputs if value not in self.cache_of]
        linear = {id(form["weight"]["data"]): form["weight"]["data"] for form in self.forms if form["kind"] == "linear"}
        tuning.apply(module, native.isa(), list(linear.values()))
        program = module.Program(
            native.isa(),
            self.forms,
            [
                (self.graph.inputs[each].value.type.dtype, self.graph.inputs[each].value.type.shape)
                for each in self.caches
            ],
            [self._described(self.graph.inputs[each].value) for each in self.tables],
            self._buffers(arrays),
            self.widths,
            [self.values[self.graph.inputs[each].value] for each in self.floats],
            [self.values[each] for each in arrays],
        )
        return Lowered(
            program,
            self.integers,
            self.floats,
            self.caches,
            self.tables,
            self.positions,
            self.lengths,
            outputs,
            self.location,
            self.plugins,
            self.takes_any_rows,
        )

    def _buffers(self, outputs: list[Value]) -> list[int]:
        """For each value the number of its buffer: one is free again after its value was read for the last time."""
        given = {self.values[value] for value in outputs}
        given |= {self.values[self.graph.inputs[each].value] for each in self.floats}
        last_read = {value: step for step, form in enumerate(self.forms) for value in _read(form)}
        buffers = [-1] * len(self.widths)
        free: list[int] = []
        count = 0
        for step, form in enumerate(self.forms):
            for value in _written(form):
                if value not in given:
                    if not free:
                        free.append(count)
                        count += 1
                    buffers[value] = free.pop()
            for each in {*_written(form), *_read(form)}:
                if buffers[each] >= 0 and last_read.get(each, step) <= step:
                    free.append(buffers[each])
        return buffers

    # -- what operands are --------------------------------------------------------------------------------------------

    def _constant(self, value: Value | None) -> np.ndarray | None:
        if value is None:
            return None
        _require(value.constant is not None)
        return value.constant

    def _numbers(self, value: Value | None) -> np.ndarray | None:
        """A constant as float32."""
        constant = self._constant(value)
        return None if constant is None else np.asarray(constant).astype(np.float32, order="C", copy=False)

    def _scalar(self, value: Value | None) -> float:
        constant = self._constant(value)
        if constant is None or constant.size != 1:
            raise _CannotRun
        return float(constant.astype(np.float32).reshape(()))

    def _float(self, value: Value | None) -> int:
        """The number of a value, which an input gets here."""
        if value is None:
            raise _CannotRun
        if value not in self.values:
            _require(value in self.inputs and value.type.dtype in _FLOATS and value.type.rank >= 1)
            width = value.type.shape[-1]
            if not isinstance(width, int):
                raise _CannotRun
            self.floats.append(self.inputs[value])
            self.leading[value] = (self.inputs[value], value.type.rank - 1)
            self._add(value, width)
        return self.values[value]

    def _add(self, value: Value, width: int) -> int:
        self.values[value] = len(self.widths)
        self.widths.append(width)
        return self.values[value]

    def _result(self, operation: Operation, like: Value, width: int) -> int:
        self.leading[operation.results[0]] = self.leading[like]
        return self._add(operation.results[0], width)

    def _integer(self, value: Value | None, rank: int) -> int:
        """The place of an int32 input among the program's integers."""
        if value is None:
            raise _CannotRun
        _require(value in self.inputs and value.type.dtype == "i32" and value.type.rank == rank)
        if self.inputs[value] not in self.integers:
            self.integers.append(self.inputs[value])
        return self.integers.index(self.inputs[value])

    def _matrix(self, weight: Value | None, scale: Value | None, dtype: str, width: int) -> dict[str, Any]:
        data, scales = self._constant(weight), self._numbers(scale)
        if data is None:
            raise _CannotRun
        _require(data.ndim == 2 and data.shape[1] == ((width + 1) // 2 if dtype == "i4" else width))
        _require(data.dtype == DTYPES["u8" if dtype == "i4" else dtype] and data.size > 0)
        block, stride = 0, 0
        if scales is not None and scales.ndim == 2:
            stride = scales.shape[1]
            _require(stride > 0 and width % stride == 0 and scales.shape[0] == len(data))
            block = width // stride
            _require(block % 2 == 0 or dtype != "i4")  # two a byte: a scale begins with one
        elif scales is not None and scales.ndim == 1:
            _require(len(scales) == len(data))
            stride = 1
        return {
            "dtype": dtype,
            "rows": len(data),
            "width": width,
            "data": np.ascontiguousarray(data).view(np.uint8),
            "scales": scales,
            "scale_stride": stride,
            "block": block,
        }

    # -- operations ---------------------------------------------------------------------------------------------------

    def _layer_norm(self, operation: Operation) -> None:
        x, result = operation.operands[0], operation.results[0]
        number = self._float(x)
        assert x is not None
        width = self.widths[number]
        readers = self.uses.get(result, [])
        reader = readers[0] if len(readers) == 1 else None
        if reader is not None and reader.kind == "linear" and reader.attributes["gate"] is None:
            self.norms[result] = operation
            self.leading[result] = self.leading[x]
            return
        y = self._result(operation, x, width)
        self.forms.append({"kind": "norm", "x": number, "y": y, "width": width, **self._norm(operation)})

    _rms_norm = _layer_norm  # which has no bias

    def _norm(self, operation: Operation) -> dict[str, Any]:
        numbers = [self._numbers(each) for each in operation.operands[1:]]
        _require(all(each is not None for each in numbers))
        form = dict(zip(("norm_scale", "norm_bias"), numbers, strict=False))
        return form | {"epsilon": float(operation.attributes["epsilon"])}

    def _linear(self, operation: Operation) -> None:
        x, weight, weight_scale, bias, residual, pre_scale, input_scale, addend = operation.operands
        attributes = operation.attributes
        width, gate = attributes["width"], attributes["gate"]
        form: dict[str, Any] = {"kind": "linear", "width": width, "gate": gate, "activation": attributes["activation"]}
        assert x is not None
        if x in self.norms and x is not residual:  # nor the addend: that comes of an operation of its own
            form |= self._norm(self.norms[x])
            form["x"] = self._float(self.norms[x].operands[0])
        else:
            form["x"] = self._float(x)
        _require(self.widths[form["x"]] == (width if gate is None else 2 * width))
        form["weight"] = self._matrix(weight, weight_scale, attributes["weight_dtype"], width)
        rows = form["weight"]["rows"]
        form["bias"] = self._numbers(bias)
        _require(form["bias"] is None or form["bias"].shape == (rows,))
        form["pre_scale"] = self._numbers(pre_scale)
        _require(form["pre_scale"] is None or form["pre_scale"].shape == (width,))
        if attributes["input_dtype"] is not None:
            form["input_rounding"] = attributes["input_dtype"]
            if input_scale is None:
                form["per_token"] = True
            else:
                form["input_scale"] = self._scalar(input_scale)
        # 16 bits a block of inputs are more than float16's 11, but less than float32's 24. int8 they hold exactly.
        # Weights in blocks that do not fit those products are widened to floats, all blocks alike.
        fits = form["weight"]["block"] % _INTEGER_BLOCK == 0
        form["takes_integers"] = fits and (x.type.dtype in ("f16", "bf16") or attributes["input_dtype"] == "i8")
        if residual is not None:
            form["residual"] = self._float(residual)
            # Broadcasts are the reference's business.
            _require(self.widths[form["residual"]] == rows and self.leading[residual] == self.leading[x])
        if addend is not None:
            form["addend"] = self._float(addend)
            _require(self.widths[form["addend"]] == rows and self.leading[addend] == self.leading[x])
        form["y"] = self._result(operation, x, rows)
        self.forms.append(form)

    def _finish(self, operation: Operation) -> None:
        x, bias, residual, addend = operation.operands
        number = self._float(x)
        assert x is not None
        width = self.widths[number]
        form = {"kind": "finish", "x": number, "width": width, "activation": operation.attributes["activation"]}
        form["bias"] = self._numbers(bias)
        _require(form["bias"] is None or form["bias"].shape == (width,))
        for name, value in (("residual", residual), ("addend", addend)):
            if value is not None:
                form[name] = self._float(value)
                _require(self.widths[form[name]] == width and self.leading[value] == self.leading[x])
        self.forms.append(form | {"y": self._result(operation, x, width)})

    def _plugin(self, operation: Operation) -> None:
        try:
            plugin = calling.of(operation.attributes)
        except PluginError:
            raise _CannotRun from None  # and say so where it is called
        form = plugin_form(plugin, operation, where(operation.location))
        if form is None:
            raise _CannotRun
        values = [value for value in operation.operands if value is not None and is_value(value)]
        for tensor, value in zip(form["inputs"], operation.operands, strict=True):
            if "value" in tensor:
                tensor["value"] = self._float(value)
        like, rank = values[0], self.leading[values[0]][1] + 1
        _require(all(self.leading[each] == self.leading[like] for each in values))
        _require(plugin.rows is not False or rank <= 3)
        for tensor, result in zip(form["outputs"], operation.results, strict=True):
            width = result.type.shape[-1]
            # Rows are told from each other by the dimensions before the last, which have to be the inputs'.
            if result.type.shape[:-1] != like.type.shape[:-1] or not isinstance(width, int):
                raise _CannotRun
            self.leading[result] = self.leading[like]
            tensor["value"] = self._add(result, width)
        self.plugins.append(plugin)
        self.takes_any_rows &= plugin.rows is not False
        numbers = {"x": self.values[like], "y": self.values[operation.results[0]]}
        self.forms.append({"kind": "plugin", **numbers, "plugin": form | {"rank": rank}})

    def _low_rank(self, operation: Operation) -> None:
        x, slot, down, up = operation.operands
        assert x is not None and down is not None and up is not None
        gate = operation.attributes["gate"]
        (_, _, rank, width), outputs = down.type.shape, up.type.shape[3]
        number = self._float(x)
        if not isinstance(width, int) or not isinstance(outputs, int) or not isinstance(rank, int):
            raise _CannotRun
        _require(self.widths[number] == (width if gate is None else 2 * width) and self.leading[x][1] == 2)
        _require(down.type.dtype == up.type.dtype and rank <= _MOST_RANK)
        form = {"kind": "low_rank", "x": number, "slot": self._integer(slot, 1), "gate": gate, "width": width}
        form |= {"down": self._table(down), "up": self._table(up), "layer": operation.attributes["layer"]}
        self.forms.append(form | {"outputs": outputs, "y": self._result(operation, x, outputs)})

    def _table(self, value: Value) -> int:
        """The number of a table of adapters or of prompts' rows, which is an input."""
        _require(value in self.inputs and value.type.is_static and value.type.dtype in _FLOATS)
        if self.inputs[value] not in self.tables:
            self.tables.append(self.inputs[value])
        return self.tables.index(self.inputs[value])

    @staticmethod
    def _described(table: Value) -> tuple[str, tuple[int, ...]]:
        """Its type and shape (slots, layers, rank, width), of rows (1, 1, rows, width)."""
        shape = tuple(int(each) for each in table.type.shape)  # type: ignore[arg-type]
        return table.type.dtype, (1,) * (4 - len(shape)) + shape

    def _embedding(self, operation: Operation) -> None:
        idx, position, table, table_scale, position_table, position_scale, *prompts = operation.operands
        attributes = operation.attributes
        form: dict[str, Any] = {"kind": "embedding", "tokens": self._integer(idx, 2)}
        assert idx is not None
        if position is not None:
            form["position"] = self._integer(position, 1)
        width = attributes["width"]
        form["weight"] = self._matrix(table, table_scale, attributes["weight_dtype"], width)
        if position_table is not None:
            form["positions"] = self._matrix(position_table, position_scale, attributes["position_dtype"], width)
        for each in prompts:
            assert each is not None
            form["prompts"] = self._table(each)
        self.leading[operation.results[0]] = (self.inputs[idx], 2)
        form["y"] = self._add(operation.results[0], attributes["width"])
        self.location = operation.location
        self.forms.append(form)

    def _rotary(self, operation: Operation) -> None:
        raise _CannotRun  # but in an attention

    def _token_rows(self, operation: Operation) -> None:
        raise _CannotRun  # but in an embedding

    def _last_rows(self, operation: Operation) -> None:
        x, last = operation.operands
        number = self._float(x)
        assert x is not None
        source, leading = self.leading[x]
        _require(leading == 2)
        form = {"kind": "last_rows", "x": number, "last": self._integer(last, 1)}
        self.leading[operation.results[0]] = (source, 1)
        form["y"] = self._add(operation.results[0], self.widths[number])
        self.forms.append(form)

    def _attention(self, operation: Operation) -> None:
        qkv, cache, position, k_scale, v_scale, frequencies = operation.operands
        attributes = operation.attributes
        heads, groups, size = attributes["heads"], attributes["groups"], attributes["head_size"]
        number = self._float(qkv)
        assert qkv is not None
        _require(self.widths[number] == (heads + 2 * groups) * size and self.leading[qkv][1] == 2)
        form: dict[str, Any] = {
            "kind": "attention",
            "x": number,
            "heads": heads,
            "groups": groups,
            "head_size": size,
            "window": attributes["window"],
            "score_scale": float(attributes["scale"]),
            "layer": attributes["layer"],
            "rounding": attributes["rounding"],
        }
        if attributes["rounding"] is not None:
            form |= {"k_scale": self._scalar(k_scale), "v_scale": self._scalar(v_scale)}
        if frequencies is not None:
            form |= self._frequencies(frequencies)
        if cache is not None:
            form["position"] = self._integer(position, 1)
            form["cache"] = self._cache(cache, position, qkv)
            self.cache_of[operation.results[1]] = form["cache"]
            self.newest[form["cache"]] = operation.results[1]
        else:
            _require(position is None)
        form["y"] = self._result(operation, qkv, heads * size)
        self.forms.append(form)

    def _frequencies(self, value: Value) -> dict[str, Any]:
        """Layers that turn alike share one array, by which the program knows that it has computed the turns already."""
        numbers = self._numbers(value)
        assert numbers is not None
        shared = self.frequencies.setdefault(numbers.tobytes(), numbers)
        return {"frequencies": shared, "half": len(shared)}

    def _cache(self, cache: Value, position: Value | None, qkv: Value) -> int:
        """The number of a cache, of which ``cache`` is the newest version and read here only."""
        _require(len(self.uses.get(cache, [])) == 1)
        if cache in self.cache_of:
            number = self.cache_of[cache]
            assert position is not None
            _require(self.positions[number] == self.inputs[position] and self.lengths[number] == self._length(qkv))
            return number
        _require(cache in self.inputs and cache.type.rank == 6 and cache.type.is_static)
        _require(cache.type.dtype in _CACHES)
        assert position is not None
        self.caches.append(self.inputs[cache])
        self.positions.append(self.inputs[position])
        self.lengths.append(self._length(qkv))
        return len(self.caches) - 1

    def _length(self, qkv: Value) -> tuple[int, int]:
        return self.leading[qkv][0], self.leading[qkv][1] - 1


def _read(form: dict[str, Any]) -> list[int]:
    """The values that an operation reads."""
    if form["kind"] == "plugin":
        return [each["value"] for each in form["plugin"]["inputs"] if "value" in each]
    return [form[key] for key in ("x", "residual", "addend") if key in form]


def _written(form: dict[str, Any]) -> list[int]:
    return [each["value"] for each in form["plugin"]["outputs"]] if form["kind"] == "plugin" else [form["y"]]


def _uses(graph: Graph) -> dict[Value, list[Operation | None]]:
    """Who reads each value, once for each operand; None where the caller gets it."""
    uses: dict[Value, list[Operation | None]] = {}
    for operation in graph.operations:
        for operand in operation.operands:
            if operand is not None:
                uses.setdefault(operand, []).append(operation)
    for output in graph.outputs:
        uses.setdefault(output, []).append(None)
    return uses

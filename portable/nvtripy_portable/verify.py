"""What TensorRT 10 accepts, one line an operation: a graph that breaks a rule would not compile there, so it does not
compile here.

A line names the operands and the element types that they may have; a letter that occurs twice is the same type both
times. What a line cannot say (ranks, dimensions, axes, constants) a function adds. An unknown dimension is never an
error. Dimensions of operands that contradict each other are refused by :mod:`nvtripy_portable.shape_inference`, which
knows more of them, in TensorRT's own words.

The rules are those of the operations' definitions and verifiers in NVIDIA/TensorRT-Incubator; where those are doubtful,
what nvtripy documents as valid for a function that lowers to an operation is valid here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

from nvtripy_portable.dims import Dim
from nvtripy_portable.graph import DTYPE_NAMES, Graph, GraphError, Operation, TensorType, Value
from nvtripy_portable.reference import ACTIVATION_PARAMETERS

_FLOATS = "f16 bf16 f32"
_NUMBERS = f"i8 i32 i64 {_FLOATS}"
_TENSOR = f"i1 {_NUMBERS}"
_ALL = f"{_TENSOR} f8e4m3fn i4"
_SHAPE = "i32"

_GREATEST_K = 3840  # of TensorRT's top-k
_PACKED = "i4"  # whose elements lie two a byte

_TRIGONOMETRY = ("kACOS", "kACOSH", "kASIN", "kASINH", "kATAN", "kATANH", "kCOSH", "kSINH", "kTAN")
_OF_FLOATS = ("kCEIL", "kCOS", "kERF", "kEXP", "kFLOOR", "kLOG", "kRECIP", "kROUND", "kSIN", "kSQRT")
_UNARY: dict[str, str] = (
    dict.fromkeys(("kABS", "kNEG", "kSIGN"), _NUMBERS)
    | dict.fromkeys(_TRIGONOMETRY, "f16 f32")
    | dict.fromkeys(_OF_FLOATS, _FLOATS)
    | {"kNOT": "i1"}
)
_ARITHMETIC = ("kSUM", "kPROD", "kMAX", "kMIN", "kSUB", "kDIV", "kFLOOR_DIV")
_COMPARISONS = ("kEQUAL", "kGREATER", "kLESS")
_LOGIC = ("kAND", "kOR", "kXOR")
_ELEMENT_WISE: dict[str, str] = (
    dict.fromkeys((*_ARITHMETIC, *_COMPARISONS), _NUMBERS)
    | dict.fromkeys(_LOGIC, "i1")
    | {"kPOW": f"i8 i64 {_FLOATS}"}  # of i32 not, as the operation's verifier says
)


def run(graph: Graph) -> None:
    """Checks every operation of a graph that no pass has changed.

    Raises:
        GraphError: one that TensorRT would refuse: which operation and operand, what is allowed and what came, and
            where.
    """
    built: set[Value] = set()  # known when the engine is built
    for operation in graph.operations:
        _check(operation, built)
        if all(operand in built for operand in operation.operands if operand is not None) or _is_static_shape(operation):
            built.update(operation.results)


def check_operands(operation: Operation) -> None:
    """Checks one operation as far as it can be without those before it, whose results may not be known yet.

    Raises:
        GraphError: as :func:`run`.
    """
    _check(operation, None)


def _is_static_shape(operation: Operation) -> bool:
    operand = operation.operands[0] if operation.kind == "shape" else None
    return operand is not None and operand.type.is_static


def _check(operation: Operation, built: set[Value] | None) -> None:
    rule = _RULES.get(operation.kind)
    if rule is None:
        raise GraphError(f"expected one of TensorRT's operations but got {operation.kind}", operation.location)
    call = _Call(operation, rule.bind(operation), built)
    for more in rule.more:
        more(call)


def _refuse(operation: Operation, what: str, expected: str, got: object) -> NoReturn:
    kind = operation.attributes.get("operation")
    name = operation.kind if kind is None else f"{operation.kind} {kind}"
    raise GraphError(f"{name}: expected {what} {expected} but got {got}", operation.location)


class _Call:
    """One operation under examination: its operands by the names of its rule."""

    def __init__(self, operation: Operation, operands: dict[str, Value], built: set[Value] | None) -> None:
        self.operation, self.operands, self._built = operation, operands, built
        self.attributes = operation.attributes

    def type(self, name: str) -> TensorType:
        return self.operands[name].type

    @property
    def result(self) -> TensorType | None:
        """The type of the first result; None where it is to be inferred."""
        return self.operation.results[0].type if self.operation.results else None

    def refuse(self, what: str, expected: str, got: object) -> NoReturn:
        _refuse(self.operation, what, expected, got)

    def expect(self, condition: bool, what: str, expected: str, got: object) -> None:
        if not condition:
            self.refuse(what, expected, got)

    def is_built(self, name: str) -> bool:
        """Whether an operand is a constant by the time the engine is built."""
        return self._built is None or self.operands[name] in self._built

    def expect_one_of(self, what: str, table: dict[str, str] | dict[str, tuple[str, ...]]) -> str:
        kind = self.attributes["operation"]
        self.expect(kind in table, what, f"to be one of {', '.join(table)}", kind)
        return str(kind)

    def expect_axis(self, axis: int, of: str, what: str = "axis") -> None:
        rank = self.type(of).rank
        self.expect(0 <= axis < rank, what, f"to be within the {rank} dimensions of {of}", axis)

    def expect_vector(self, name: str, length: int) -> None:
        """That an operand, if it is there, is a shape, or whatever has one element for each dimension."""
        if name in self.operands:
            shape = self.type(name).shape
            fits = len(shape) == 1 and not _differ(shape[0], length)
            self.expect(fits, name, f"to be 1-D and of {length} elements", self.type(name))

    def expect_length(self, length: int, *names: str) -> None:
        for name in names:
            values = self.attributes[name]
            self.expect(len(values) == length, name, f"to be {length} numbers", list(values))


_More = Callable[[_Call], None]


class _Rule:
    """``operands -> results``: each operand ``name:letter``, with ``?`` where it may be absent, with ``*`` where it
    stands for any number; each result a letter. The letters' types are the keyword arguments."""

    def __init__(self, signature: str, *more: _More, **types: str) -> None:
        operands, _, results = signature.partition("->")
        self.more = more
        self._types = {letter: frozenset(names.split()) for letter, names in types.items()}
        self._texts = {letter: names.replace(" ", ", ") for letter, names in types.items()}
        self._operands = []
        for each in operands.split():
            name, _, letter = each.partition(":")
            self._operands.append((name, letter[0], letter[1:]))
        self._results = results.split()

    def bind(self, operation: Operation) -> dict[str, Value]:
        """The operands by name, of types that are allowed."""
        found: dict[str, str] = {}
        bound: dict[str, Value] = {}
        for name, letter, mark, operand in self._pairs(operation):
            if operand is None:
                if mark != "?":
                    _refuse(operation, name, "to be there", "none")
                continue
            self._expect(operation, name, letter, operand.type, found)
            bound[name] = operand
        for letter, result in zip(self._results, operation.results, strict=False):
            self._expect(operation, "the result", letter, result.type, found)
        return bound

    def _pairs(self, operation: Operation) -> list[tuple[str, str, str, Value | None]]:
        operands = operation.operands
        if self._operands and self._operands[0][2] == "*":
            name, letter, _ = self._operands[0]
            if not operands:
                _refuse(operation, name, "at least one", "none")
            return [(f"{name}[{i}]", letter, "", operand) for i, operand in enumerate(operands)]
        padded = [*operands, *[None] * (len(self._operands) - len(operands))]
        if len(padded) > len(self._operands):
            _refuse(operation, "operands", f"of at most {len(self._operands)}", len(operands))
        return [(*each, operand) for each, operand in zip(self._operands, padded, strict=True)]

    def _expect(self, operation: Operation, what: str, letter: str, type: TensorType, found: dict[str, str]) -> None:
        if type.dtype not in self._types[letter]:
            _refuse(operation, what, f"of type {self._texts[letter]}", type)
        if found.setdefault(letter, type.dtype) != type.dtype:
            _refuse(operation, what, f"of type {found[letter]}, as the operands before it", type)


def _differ(a: Dim, b: Dim) -> bool:
    """Whether two dimensions are certainly not the same."""
    return isinstance(a, int) and isinstance(b, int) and a != b


def _expect_same_rank(call: _Call, *names: str) -> None:
    ranks = [call.type(name).rank for name in names]
    got = " and ".join(str(call.type(name)) for name in names)
    call.expect(len(set(ranks)) == 1, " and ".join(names), "of one rank", got)


def _expect_same_shape(call: _Call) -> None:
    """That the result has the input's shape."""
    result, source = call.result, call.type("input")
    if result is not None:
        fits = len(result.shape) == source.rank and not any(map(_differ, result.shape, source.shape))
        call.expect(fits, "the result", f"of the shape of {source}", result)


# --- what a line of the table cannot say ------------------------------------------------------------------------------


def _activation(call: _Call) -> None:
    kind = call.expect_one_of("the activation", ACTIVATION_PARAMETERS)
    if call.type("input").dtype in ("i32", "i64"):
        call.expect(kind == "kRELU", "input", f"of type {_NUMBERS.replace('i32 i64 ', '')}", call.type("input"))
    for name in ("alpha", "beta"):
        is_wanted, value = name in ACTIVATION_PARAMETERS[kind], call.attributes.get(name)
        call.expect((value is not None) == is_wanted, name, "to be given" if is_wanted else "to be absent", value)


def _broadcast(call: _Call) -> None:
    source, result, dims = call.type("input"), call.result, call.attributes["broadcast_dims"]
    call.expect(len(dims) == source.rank, "broadcast_dims", f"to be {source.rank} numbers", list(dims))
    call.expect(len(set(dims)) == len(dims), "broadcast_dims", "to be distinct", list(dims))
    if result is not None:
        within = all(0 <= dim < result.rank for dim in dims)
        call.expect(within, "broadcast_dims", f"to be within the {result.rank} dimensions of the result", list(dims))
        call.expect_vector("shape", result.rank)


def _collapse_rank(call: _Call) -> None:
    source, result = call.type("input"), call.result
    if result is None:
        return
    call.expect(result.rank <= source.rank, "the result", f"of at most {source.rank} dimensions", result)
    if source.is_static and result.is_static:
        kept = [size for size in source.shape if size != 1]
        fits = kept == [size for size in result.shape if size != 1]
        call.expect(fits, "the result", f"to lack dimensions of size 1 of {source} only", result)


def _concatenation(call: _Call) -> None:
    _expect_same_rank(call, *call.operands)
    call.expect_axis(call.attributes["axis"], next(iter(call.operands)))


def _constant(call: _Call) -> None:
    value = call.attributes["value"]
    came = TensorType(DTYPE_NAMES[value.dtype], value.shape)
    call.expect(call.result in (None, came), "the result", f"of type {came}, as its elements", call.result)


def _convolution(call: _Call) -> None:
    # Channels in and out of a kernel: (O, I / groups, ...), and (I, O / groups, ...) of a deconvolution.
    _expect_window(call, "kernel")
    groups = call.attributes["num_groups"]
    (out, *_), channels = call.type("kernel").shape, call.type("input").shape[1]
    for what, size in (("input channels", channels), ("output channels", out)):
        call.expect(not isinstance(size, int) or size % groups == 0, what, f"that {groups} groups divide", size)
    _expect_bias(call, out)


def _deconvolution(call: _Call) -> None:
    _expect_window(call, "kernel")
    groups = call.attributes["num_groups"]
    channels, out = call.type("input").shape[1], call.type("kernel").shape[1]
    fits = not isinstance(channels, int) or channels % groups == 0
    call.expect(fits, "input channels", f"that {groups} groups divide", channels)
    _expect_bias(call, out * groups if isinstance(out, int) else None)


def _expect_window(call: _Call, kernel: str) -> None:
    rank = call.type("input").rank
    call.expect(rank >= 3, "input", "of a rank of at least 3", call.type("input"))
    _expect_same_rank(call, "input", kernel)
    call.expect_length(rank - 2, "stride", "pre_padding", "post_padding", "dilation")
    call.expect(call.attributes["num_groups"] >= 1, "num_groups", "of at least 1", call.attributes["num_groups"])


def _expect_bias(call: _Call, channels: Dim) -> None:
    if "bias" in call.operands:
        bias = call.type("bias")
        fits = bias.rank == 1 and not _differ(bias.shape[0], channels)
        call.expect(fits, "bias", f"of one dimension and {channels} elements, the output channels", bias)


def _element_wise(call: _Call) -> None:
    kind = call.expect_one_of("the operation", _ELEMENT_WISE)
    dtype = call.type("lhs").dtype
    call.expect(dtype in _ELEMENT_WISE[kind].split(), "lhs", f"of type {_listed(_ELEMENT_WISE[kind])}", call.type("lhs"))
    wanted = "i1" if kind in _COMPARISONS else dtype
    if call.result is not None:
        call.expect(call.result.dtype == wanted, "the result", f"of type {wanted}", call.result)
    _expect_same_rank(call, "lhs", "rhs")


def _listed(types: str) -> str:
    return types.replace(" ", ", ")


def _gather(call: _Call) -> None:
    axis, common = call.attributes["axis"], call.attributes["num_broadcast_dims"]
    call.expect_axis(axis, "data")
    most = min(1, axis, call.type("indices").rank)
    call.expect(0 <= common <= most, "num_broadcast_dims", f"within [0, {most}]", common)


def _linspace(call: _Call) -> None:
    call.expect(call.type("start").rank == 0, "start", "to be a scalar", call.type("start"))
    call.expect(call.type("shape").rank == 1, "shape", "to be 1-D", call.type("shape"))
    if call.result is not None:
        call.expect_vector("shape", call.result.rank)
        call.expect_vector("step", call.result.rank)


def _matrix_multiply(call: _Call) -> None:
    batches = []
    for name, attribute in (("input0", "op0"), ("input1", "op1")):
        rank, op = call.type(name).rank, call.attributes[attribute]
        call.expect(op in ("kNONE", "kTRANSPOSE", "kVECTOR"), attribute, "to be kNONE, kTRANSPOSE or kVECTOR", op)
        least = 1 if op == "kVECTOR" else 2
        call.expect(rank >= least, name, f"of a rank of at least {least} for {op}", call.type(name))
        batches.append(rank - least)
    got = f"{call.type('input0')} and {call.type('input1')}"
    call.expect(batches[0] == batches[1], "input0 and input1", "of equally many batch dimensions", got)


def _normalization(call: _Call) -> None:
    _expect_same_rank(call, "input", "scale", "bias")
    source, axes, groups = call.type("input"), call.attributes["axis"], call.attributes["num_groups"]
    for axis in axes:
        call.expect_axis(axis, "input")
    if groups == 1:
        return
    call.expect(source.rank > 2, "input", "of a rank of at least 3 where num_groups is not 1", source)
    call.expect(tuple(axes) == tuple(range(2, source.rank)), "axis", "to be all after the channels", list(axes))
    channels = source.shape[1]
    fits = not isinstance(channels, int) or channels % groups == 0
    call.expect(fits, "input", f"of channels that {groups} groups divide", source)
    for name in ("scale", "bias"):
        shape = (1, groups, *[1] * (source.rank - 2))
        fits = not any(map(_differ, call.type(name).shape, shape))
        call.expect(fits, name, f"of the shape {list(shape)}, one for each group", call.type(name))


def _pooling(call: _Call) -> None:
    source, kind = call.type("input"), call.attributes["pooling_type"]
    call.expect(source.rank in (4, 5), "input", "of rank 4 or 5", source)
    call.expect_length(source.rank - 2, "window_size", "stride", "pre_padding", "post_padding")
    call.expect(kind in ("kMAX", "kAVERAGE"), "pooling_type", "to be kMAX or kAVERAGE", kind)
    is_given = call.attributes["average_count_excludes_padding"] is not None
    wanted = "to be given for an average only"
    call.expect(is_given == (kind == "kAVERAGE"), "average_count_excludes_padding", wanted, kind)


def _quantize(call: _Call) -> None:
    _quantization(call, None if call.result is None else call.result.dtype)
    if call.result is not None and call.result.dtype == _PACKED:
        call.expect(call.is_built("input"), "input", f"to be a constant for a result of type {_PACKED}", call.type("input"))


def _dequantize(call: _Call) -> None:
    source = call.type("input")
    _quantization(call, source.dtype)
    if source.dtype == _PACKED and isinstance(source.shape[-1], int):
        call.expect(source.shape[-1] % 2 == 0, "input", f"of type {_PACKED} to have an even last dimension", source)


def _quantization(call: _Call, dtype: str | None) -> None:
    """Where the scale may lie: on the whole tensor, along an axis, or on blocks of i4 along the first dimension."""
    source, scale, axis = call.type("input"), call.type("scale"), call.attributes["axis"]
    call.expect(source.rank > 0, "input", "of a rank of at least 1", source)
    call.expect(call.is_built("scale"), "scale", "to be a constant that is known when the engine is built", scale)
    _expect_same_shape(call)
    if axis is not None:
        call.expect_axis(axis, "input")
        fits = scale.rank == 1 and not _differ(scale.shape[0], source.shape[axis])
        call.expect(fits, "scale", f"of one dimension, as long as dimension {axis} of {source}", scale)
        call.expect(dtype != "f8e4m3fn", "scale", "to be a scalar for f8e4m3fn", scale)
    elif scale.rank == 2:
        call.expect(dtype in (None, _PACKED), "scale", f"to be a scalar, as only {_PACKED} has blocks", scale)
        call.expect(source.rank == 2, "input", "of 2 dimensions for a scale of 2", source)
        call.expect(not _differ(scale.shape[1], source.shape[1]), "scale", f"as wide as {source}", scale)
        blocks, rows = scale.shape[0], source.shape[0]
        if isinstance(blocks, int) and isinstance(rows, int):
            fits = blocks > 0 and rows % blocks == 0
            call.expect(fits, "scale", f"of blocks that divide the first dimension of {source}", scale)
    else:
        call.expect(scale.rank == 0, "scale", "to be a scalar where no axis is given", scale)


def _reduce(call: _Call) -> None:
    for axis in call.attributes["axes"]:
        call.expect_axis(axis, "input", "axes")


def _reshape(call: _Call) -> None:
    shape = call.type("shape")
    call.expect(shape.rank == 1 and shape.is_static, "shape", "to be 1-D and of a known length", shape)
    if call.result is not None:
        call.expect_vector("shape", call.result.rank)


def _resize(resized: int) -> _More:
    """Of the innermost dimensions ``resized`` may change."""

    def check(call: _Call) -> None:
        source, scales = call.type("input"), call.attributes["scales"]
        given = "either scales or output_shape"
        call.expect((scales is None) == ("output_shape" in call.operands), "it", f"to have {given}", scales)
        call.expect_vector("output_shape", source.rank)
        outer = max(source.rank - resized, 0)
        if scales is not None:
            call.expect_length(source.rank, "scales")
            call.expect(set(scales[:outer]) <= {1}, "scales", f"of 1 but for the last {resized}", list(scales))
        if call.result is not None:
            fits = call.result.rank == source.rank
            fits = fits and not any(map(_differ, call.result.shape[:outer], source.shape[:outer]))
            call.expect(fits, "the result", f"like {source} but for the last {resized} dimensions", call.result)

    return check


def _select(call: _Call) -> None:
    _expect_same_rank(call, "condition", "then", "else")


def _shape(call: _Call) -> None:
    rank = call.type("input").rank
    if call.result is not None:
        call.expect(call.result.shape == (rank,), "the result", f"of one dimension and {rank} elements", call.result)


def _slice(call: _Call) -> None:
    source, mode = call.type("input"), call.attributes["mode"]
    for name in ("start", "size", "stride"):
        call.expect_vector(name, source.rank)
    call.expect("fill" not in call.operands or mode == "kFILL", "mode", "to be kFILL where a fill is given", mode)
    if mode in ("kFILL", "kREFLECT", "kCLAMP"):
        call.expect(source.dtype != "bf16", "input", f"not of type bf16 in the mode {mode}", source)


def _softmax(call: _Call) -> None:
    call.expect_axis(call.attributes["axis"], "input")


def _top_k(call: _Call) -> None:
    axis, k = call.attributes["axis"], call.attributes["k"]
    call.expect_axis(axis, "input")
    size = call.type("input").shape[axis]
    most = min(_GREATEST_K, size) if isinstance(size, int) else _GREATEST_K
    call.expect(0 <= k <= most, "k", f"of at most {most} for {call.type('input')}", k)


def _transpose(call: _Call) -> None:
    rank, permutation = call.type("input").rank, call.attributes["permutation"]
    is_whole = sorted(permutation) == list(range(rank))
    call.expect(is_whole, "permutation", f"of the {rank} dimensions of {call.type('input')}", list(permutation))


def _unary(call: _Call) -> None:
    kind = call.expect_one_of("the operation", _UNARY)
    source = call.type("input")
    call.expect(source.dtype in _UNARY[kind].split(), "input", f"of type {_listed(_UNARY[kind])}", source)


_RULES: dict[str, _Rule] = {
    "activation": _Rule("input:T -> T", _activation, _expect_same_shape, T=_NUMBERS),
    "broadcast": _Rule("input:T shape:S -> T", _broadcast, T=_ALL, S=_SHAPE),
    "cast": _Rule("input:A -> B", _expect_same_shape, A=f"{_TENSOR} u8", B=f"{_TENSOR} u8"),
    "collapse_rank": _Rule("input:T -> T", _collapse_rank, T=_ALL),
    "concatenation": _Rule("inputs:T* -> T", _concatenation, T=f"{_TENSOR} f8e4m3fn"),
    "constant": _Rule("-> T", _constant, T=_ALL),
    "convolution": _Rule("input:T kernel:T bias:T? -> T", _convolution, T=_FLOATS),
    "deconvolution": _Rule("input:T kernel:T bias:T? -> T", _deconvolution, T="i8 f16 f32"),
    "dequantize": _Rule("input:Q scale:T -> T", _dequantize, Q="i8 f8e4m3fn i4", T=_FLOATS),
    "element_wise": _Rule("lhs:T rhs:T -> R", _element_wise, T=_TENSOR, R=_TENSOR),
    "gather": _Rule("data:T indices:I -> T", _gather, T=_TENSOR, I="i32 i64"),
    "linspace": _Rule("shape:S start:T step:T -> T", _linspace, S="i32 i64", T="i32 i64 f32"),
    "matrix_multiply": _Rule("input0:T input1:T -> T", _matrix_multiply, T=_FLOATS),
    "normalization": _Rule("input:T scale:T bias:T -> T", _normalization, _expect_same_shape, T=_FLOATS),
    "pooling": _Rule("input:T -> T", _pooling, T=f"i8 {_FLOATS}"),
    "quantize": _Rule("input:T scale:S -> Q", _quantize, T=_FLOATS, S=_FLOATS, Q="i8 f8e4m3fn i4"),
    "reduce": _Rule("input:T -> T", _reduce, T=_NUMBERS),
    "reshape": _Rule("input:T shape:S -> T", _reshape, T=_ALL, S=_SHAPE),
    "resize_cubic": _Rule("input:T output_shape:S? -> T", _resize(2), T="i8 f16 f32", S=_SHAPE),
    "resize_linear": _Rule("input:T output_shape:S? -> T", _resize(3), T="i8 f16 f32", S=_SHAPE),
    "resize_nearest": _Rule("input:T output_shape:S? -> T", _resize(3), T="i8 f16 f32", S=_SHAPE),
    "select": _Rule("condition:C then:T else:T -> T", _select, C="i1", T=_TENSOR),
    "shape": _Rule("input:T -> S", _shape, T=_ALL, S=_SHAPE),
    "slice": _Rule("input:T start:S size:S stride:S fill:T? -> T", _slice, T=_TENSOR, S=_SHAPE),
    "softmax": _Rule("input:T -> T", _softmax, _expect_same_shape, T=_FLOATS),
    "top_k": _Rule("input:T -> T I", _top_k, T=f"i32 i64 {_FLOATS}", I="i32"),
    "transpose": _Rule("input:T -> T", _transpose, T=_ALL),
    "unary": _Rule("input:T -> T", _unary, _expect_same_shape, T=_TENSOR),
}

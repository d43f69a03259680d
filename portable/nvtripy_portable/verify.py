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

from collections.abc import Callable, Mapping
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
_ELEMENT_WISE: dict[str, str] = (
    dict.fromkeys((*_ARITHMETIC, *_COMPARISONS), _NUMBERS)
    | dict.fromkeys(("kAND", "kOR", "kXOR"), "i1")
    | {"kPOW": f"i8 i64 {_FLOATS}"}  # of i32 not, as the operation's verifier says
)
_MATRICES = {"kNONE": 2, "kTRANSPOSE": 2, "kVECTOR": 1}  # and the rank that they need at least
_POOLINGS = {"kMAX": False, "kAVERAGE": True}  # and whether they average


def run(graph: Graph) -> None:
    """Checks every operation of a graph that no pass has changed.

    Raises:
        GraphError: one that TensorRT would refuse: which operation and operand, what is allowed and what came, and
            where.
    """
    built: set[Value] = set()  # known when the engine is built
    for operation in graph.operations:
        if operation.kind != "plugin":  # what one takes is its own affair
            _check(operation, built)
        if _is_built(operation, built):
            built.update(operation.results)


def check_operands(operation: Operation) -> None:
    """Checks one operation as far as it can be without those before it, whose results may not be known yet.

    Raises:
        GraphError: as :func:`run`.
    """
    _check(operation, None)


def _is_built(operation: Operation, built: set[Value]) -> bool:
    operands = operation.operands
    if operation.kind == "shape" and operands[0] is not None and operands[0].type.is_static:
        return True
    return operation.kind != "plugin" and all(operand is None or operand in built for operand in operands)


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
    """One operation under examination: the types of its operands by the names of its rule, and of its first result
    (None where that is to be inferred)."""

    def __init__(self, operation: Operation, operands: dict[str, Value], built: set[Value] | None) -> None:
        self.operation, self.operands, self._built = operation, operands, built
        self.attributes = operation.attributes
        self.result = operation.results[0].type if operation.results else None

    def type(self, name: str) -> TensorType:
        return self.operands[name].type

    def refuse(self, what: str, expected: str, got: object) -> NoReturn:
        _refuse(self.operation, what, expected, got)

    def refuse_operand(self, name: str, expected: str) -> NoReturn:
        _refuse(self.operation, name, expected, self.operands[name].type)

    def is_built(self, name: str) -> bool:
        """Whether an operand is a constant by the time the engine is built."""
        return self._built is None or self.operands[name] in self._built

    def expect_kind(self, table: Mapping[str, object], attribute: str = "operation") -> str:
        kind = self.attributes[attribute]
        if kind not in table:
            self.refuse(attribute, f"to be one of {', '.join(table)}", kind)
        return str(kind)

    def expect_axis(self, axis: int, of: str, what: str = "axis") -> None:
        rank = self.type(of).rank
        if not 0 <= axis < rank:
            self.refuse(what, f"to be within the {rank} dimensions of {of}", axis)

    def expect_vector(self, name: str, length: int) -> None:
        """That an operand, if it is there, is a shape, or whatever has one element for each dimension."""
        if name in self.operands:
            shape = self.type(name).shape
            if len(shape) != 1 or _differ(shape[0], length):
                self.refuse_operand(name, f"to be 1-D and of {length} elements")

    def expect_length(self, length: int, *names: str) -> None:
        for name in names:
            if len(self.attributes[name]) != length:
                self.refuse(name, f"to be {length} numbers", list(self.attributes[name]))


_More = Callable[[_Call], None]


class _Rule:
    """``operands -> results``: each operand ``name:letter``, with ``?`` where it may be absent, with ``*`` where it
    stands for any number; each result a letter. The letters' types are the keyword arguments."""

    def __init__(self, signature: str, *more: _More, **types: str) -> None:
        operands, _, results = signature.partition("->")
        self.more = more
        self._types = {letter: frozenset(names.split()) for letter, names in types.items()}
        self._texts = {letter: _listed(names) for letter, names in types.items()}
        self._operands = [tuple(each.rstrip("?*").split(":")) for each in operands.split()]
        self._num_required = sum(not each.endswith(("?", "*")) for each in operands.split())
        self._repeats = operands.strip().endswith("*")
        self._results = results.split()

    def bind(self, operation: Operation) -> dict[str, Value]:
        """The operands by name, of types that are allowed."""
        found: dict[str, str] = {}
        bound: dict[str, Value] = {}
        expected = self._operands
        if self._repeats:
            ((name, letter),) = expected
            expected = [(f"{name}[{i}]", letter) for i in range(max(1, len(operation.operands)))]
        if len(operation.operands) > len(expected):
            _refuse(operation, "operands", f"to be at most {len(expected)}", len(operation.operands))
        for (name, letter), operand in zip(expected, operation.operands, strict=False):
            if operand is not None:
                self._expect(operation, name, letter, operand.type, found)
                bound[name] = operand
        if len(bound) < max(self._num_required, self._repeats):
            _refuse(
                operation, "operands", f"{', '.join(name for name, _ in expected)}", f"{', '.join(bound) or 'none'}"
            )
        for letter, result in zip(self._results, operation.results, strict=False):
            self._expect(operation, "the result", letter, result.type, found)
        return bound

    def _expect(self, operation: Operation, what: str, letter: str, type: TensorType, found: dict[str, str]) -> None:
        if type.dtype not in self._types[letter]:
            _refuse(operation, what, f"of type {self._texts[letter]}", type)
        if found.setdefault(letter, type.dtype) != type.dtype:
            _refuse(operation, what, f"of type {found[letter]}, as the operands before it", type)


def _listed(types: str) -> str:
    return types.replace(" ", ", ")


def _differ(a: Dim, b: Dim) -> bool:
    """Whether two dimensions are certainly not the same."""
    return isinstance(a, int) and isinstance(b, int) and a != b


def _is_multiple(dim: Dim, divisor: int) -> bool:
    """Whether a dimension is, or may be, a multiple."""
    return not isinstance(dim, int) or dim % divisor == 0


def _expect_same_rank(call: _Call, *names: str) -> None:
    if len({call.type(name).rank for name in names}) != 1:
        call.refuse(" and ".join(names), "of one rank", " and ".join(str(call.type(name)) for name in names))


def _expect_one_rank(call: _Call) -> None:
    _expect_same_rank(call, *call.operands)


def _expect_axis(call: _Call) -> None:
    call.expect_axis(call.attributes["axis"], next(iter(call.operands)))


def _expect_same_shape(call: _Call) -> None:
    """That the result has the input's shape."""
    result, source = call.result, call.type("input")
    if result is not None and (result.rank != source.rank or any(map(_differ, result.shape, source.shape))):
        call.refuse("the result", f"of the shape of {source}", result)


# --- what a line of the table cannot say ------------------------------------------------------------------------------


def _activation(call: _Call) -> None:
    kind = call.expect_kind(ACTIVATION_PARAMETERS)
    if kind != "kRELU" and call.type("input").dtype in ("i32", "i64"):
        call.refuse_operand("input", f"of type {_listed(f'i8 {_FLOATS}')}")
    for name in ("alpha", "beta"):
        is_wanted, value = name in ACTIVATION_PARAMETERS[kind], call.attributes.get(name)
        if (value is not None) != is_wanted:
            call.refuse(name, "to be given" if is_wanted else "to be absent", value)


def _broadcast(call: _Call) -> None:
    source, result, dims = call.type("input"), call.result, call.attributes["broadcast_dims"]
    if len(dims) != source.rank or len(set(dims)) != len(dims):
        call.refuse("broadcast_dims", f"to be {source.rank} different numbers", list(dims))
    if result is not None:
        if not all(0 <= dim < result.rank for dim in dims):
            call.refuse("broadcast_dims", f"to be within the {result.rank} dimensions of the result", list(dims))
        call.expect_vector("shape", result.rank)


def _collapse_rank(call: _Call) -> None:
    source, result = call.type("input"), call.result
    if result is None:
        return
    if result.rank > source.rank:
        call.refuse("the result", f"of at most {source.rank} dimensions", result)
    if source.is_static and result.is_static:
        kept, wanted = ([size for size in type.shape if size != 1] for type in (result, source))
        if kept != wanted:
            call.refuse("the result", f"to lack dimensions of size 1 of {source} only", result)


def _constant(call: _Call) -> None:
    value, result = call.attributes["value"], call.result
    if result is not None and (DTYPE_NAMES[value.dtype] != result.dtype or value.shape != result.shape):
        call.refuse("the result", "of the type of its elements", f"{result} for {value.dtype}{list(value.shape)}")


def _convolution(call: _Call) -> None:
    _expect_windows(call)
    kernel, groups = call.type("kernel"), call.attributes["num_groups"]  # (O, I / groups, ...)
    if not _is_multiple(kernel.shape[0], groups):
        call.refuse_operand("kernel", f"of output channels that {groups} groups divide")
    _expect_bias(call, kernel.shape[0])


def _deconvolution(call: _Call) -> None:
    _expect_windows(call)
    channels = call.type("kernel").shape[1]  # (I, O / groups, ...)
    _expect_bias(call, channels * call.attributes["num_groups"] if isinstance(channels, int) else None)


def _expect_windows(call: _Call) -> None:
    source, groups = call.type("input"), call.attributes["num_groups"]
    if source.rank < 3:
        call.refuse_operand("input", "of a rank of at least 3")
    _expect_same_rank(call, "input", "kernel")
    call.expect_length(source.rank - 2, "stride", "pre_padding", "post_padding", "dilation")
    if groups < 1 or not _is_multiple(source.shape[1], groups):
        call.refuse_operand("input", f"of channels that {groups} groups divide")


def _expect_bias(call: _Call, channels: Dim) -> None:
    if "bias" in call.operands:
        shape = call.type("bias").shape
        if len(shape) != 1 or _differ(shape[0], channels):
            call.refuse_operand("bias", f"to be 1-D, with an element for each of {channels} output channels")


def _element_wise(call: _Call) -> None:
    kind = call.expect_kind(_ELEMENT_WISE)
    dtype = call.type("lhs").dtype
    if dtype not in _ELEMENT_WISE[kind].split():
        call.refuse_operand("lhs", f"of type {_listed(_ELEMENT_WISE[kind])}")
    wanted = "i1" if kind in _COMPARISONS else dtype
    if call.result is not None and call.result.dtype != wanted:
        call.refuse("the result", f"of type {wanted}", call.result)
    _expect_same_rank(call, "lhs", "rhs")


def _gather(call: _Call) -> None:
    axis, common = call.attributes["axis"], call.attributes["num_broadcast_dims"]
    call.expect_axis(axis, "data")
    most = min(1, axis, call.type("indices").rank)
    if not 0 <= common <= most:
        call.refuse("num_broadcast_dims", f"to be within [0, {most}]", common)


def _linspace(call: _Call) -> None:
    if call.type("start").rank != 0:
        call.refuse_operand("start", "to be a scalar")
    if call.result is not None:
        call.expect_vector("shape", call.result.rank)
        call.expect_vector("step", call.result.rank)


def _matrix_multiply(call: _Call) -> None:
    batches = []
    for name, attribute in (("input0", "op0"), ("input1", "op1")):
        least = _MATRICES[call.expect_kind(_MATRICES, attribute)]
        if call.type(name).rank < least:
            call.refuse_operand(name, f"of a rank of at least {least} for {call.attributes[attribute]}")
        batches.append(call.type(name).rank - least)
    if batches[0] != batches[1]:
        got = f"{call.type('input0')} and {call.type('input1')}"
        call.refuse("input0 and input1", "of equally many batch dimensions", got)


def _normalization(call: _Call) -> None:
    _expect_same_rank(call, "input", "scale", "bias")
    source, axes, groups = call.type("input"), call.attributes["axis"], call.attributes["num_groups"]
    for axis in axes:
        call.expect_axis(axis, "input")
    if groups == 1:
        return
    if source.rank < 3 or tuple(axes) != tuple(range(2, source.rank)):
        call.refuse("axis", f"to be all after the channels of {source} for {groups} groups", list(axes))
    if not _is_multiple(source.shape[1], groups):
        call.refuse_operand("input", f"of channels that {groups} groups divide")
    shape = (1, groups, *[1] * (source.rank - 2))
    for name in ("scale", "bias"):
        if any(map(_differ, call.type(name).shape, shape)):
            call.refuse_operand(name, f"of the shape {list(shape)}, one for each group")


def _pooling(call: _Call) -> None:
    rank = call.type("input").rank
    if rank not in (4, 5):
        call.refuse_operand("input", "of rank 4 or 5")
    call.expect_length(rank - 2, "window_size", "stride", "pre_padding", "post_padding")
    is_average = _POOLINGS[call.expect_kind(_POOLINGS, "pooling_type")]
    excludes = call.attributes["average_count_excludes_padding"]
    if (excludes is not None) != is_average:
        call.refuse("average_count_excludes_padding", "to be given" if is_average else "to be absent", excludes)


def _quantize(call: _Call) -> None:
    dtype = None if call.result is None else call.result.dtype
    _quantization(call, dtype)
    if dtype == _PACKED and not call.is_built("input"):
        call.refuse("input", f"to be a constant where the result is {_PACKED}", f"{call.type('input')}, which is none")


def _dequantize(call: _Call) -> None:
    source = call.type("input")
    _quantization(call, source.dtype)
    if source.dtype == _PACKED and not _is_multiple(source.shape[-1], 2):
        call.refuse_operand("input", f"of type {_PACKED} to have an even last dimension")


def _quantization(call: _Call, dtype: str | None) -> None:
    """Where the scale may lie: on the whole tensor, along an axis, or on blocks of i4 along the first dimension."""
    source, scale, axis = call.type("input"), call.type("scale"), call.attributes["axis"]
    if source.rank == 0:
        call.refuse_operand("input", "of a rank of at least 1")
    if not call.is_built("scale"):
        call.refuse("scale", "to be a constant that is known when the engine is built", f"{scale}, which is none")
    _expect_same_shape(call)
    if axis is not None:
        call.expect_axis(axis, "input")
        if scale.rank != 1 or _differ(scale.shape[0], source.shape[axis]):
            call.refuse_operand("scale", f"to be 1-D and as long as dimension {axis} of {source}")
        if dtype == "f8e4m3fn":
            call.refuse_operand("scale", "to be a scalar for f8e4m3fn")
    elif scale.rank == 2:
        if dtype not in (None, _PACKED):
            call.refuse_operand("scale", f"to be a scalar, as only {_PACKED} has blocks")
        if source.rank != 2:
            call.refuse_operand("input", "of 2 dimensions for a scale of 2")
        blocks, rows = scale.shape[0], source.shape[0]
        divides = blocks != 0 and (not isinstance(blocks, int) or _is_multiple(rows, blocks))
        if not divides or _differ(scale.shape[1], source.shape[1]):
            call.refuse_operand("scale", f"of blocks that divide the first dimension of {source}")
    elif scale.rank != 0:
        call.refuse_operand("scale", "to be a scalar where no axis is given")


def _reduce(call: _Call) -> None:
    for axis in call.attributes["axes"]:
        call.expect_axis(axis, "input", "axes")


def _reshape(call: _Call) -> None:
    shape = call.type("shape")
    if shape.rank != 1 or not shape.is_static:
        call.refuse_operand("shape", "to be 1-D and of a known length")
    if call.result is not None:
        call.expect_vector("shape", call.result.rank)


def _resize(num_resized: int) -> _More:
    """Of the innermost dimensions ``num_resized`` may change."""

    def check(call: _Call) -> None:
        source, scales, result = call.type("input"), call.attributes["scales"], call.result
        if (scales is None) != ("output_shape" in call.operands):
            call.refuse("scales", "to be given where output_shape is not, and only there", scales)
        call.expect_vector("output_shape", source.rank)
        outer = max(source.rank - num_resized, 0)
        if scales is not None:
            call.expect_length(source.rank, "scales")
            if any(scale != 1 for scale in scales[:outer]):
                call.refuse("scales", f"to be 1 but for the last {num_resized}", list(scales))
        if result is not None and (
            result.rank != source.rank or any(map(_differ, result.shape[:outer], source.shape[:outer]))
        ):
            call.refuse("the result", f"like {source} but for the last {num_resized} dimensions", result)

    return check


def _shape(call: _Call) -> None:
    if call.result is not None and call.result.shape != (call.type("input").rank,):
        call.refuse("the result", f"to be 1-D, the shape of {call.type('input')}", call.result)


def _slice(call: _Call) -> None:
    source, mode = call.type("input"), call.attributes["mode"]
    for name in ("start", "size", "stride"):
        call.expect_vector(name, source.rank)
    if "fill" in call.operands and mode != "kFILL":
        call.refuse("mode", "to be kFILL where a fill is given", mode)
    if source.dtype == "bf16" and mode in ("kFILL", "kREFLECT", "kCLAMP"):
        call.refuse_operand("input", f"to be of another type than bf16 in the mode {mode}")


def _top_k(call: _Call) -> None:
    axis, k = call.attributes["axis"], call.attributes["k"]
    call.expect_axis(axis, "input")
    size = call.type("input").shape[axis]
    most = min(_GREATEST_K, size) if isinstance(size, int) else _GREATEST_K
    if not 0 <= k <= most:
        call.refuse("k", f"to be at most {most} for {call.type('input')}", k)


def _transpose(call: _Call) -> None:
    rank, permutation = call.type("input").rank, call.attributes["permutation"]
    if sorted(permutation) != list(range(rank)):
        call.refuse("permutation", f"to be of the {rank} dimensions of {call.type('input')}", list(permutation))


def _unary(call: _Call) -> None:
    kind = call.expect_kind(_UNARY)
    if call.type("input").dtype not in _UNARY[kind].split():
        call.refuse_operand("input", f"of type {_listed(_UNARY[kind])}")


_RULES: dict[str, _Rule] = {
    "activation": _Rule("input:T -> T", _activation, _expect_same_shape, T=_NUMBERS),
    "broadcast": _Rule("input:T shape:S -> T", _broadcast, T=_ALL, S=_SHAPE),
    "cast": _Rule("input:A -> B", _expect_same_shape, A=f"{_TENSOR} u8", B=f"{_TENSOR} u8"),
    "collapse_rank": _Rule("input:T -> T", _collapse_rank, T=_ALL),
    "concatenation": _Rule("inputs:T* -> T", _expect_one_rank, _expect_axis, T=f"{_TENSOR} f8e4m3fn"),
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
    "select": _Rule("condition:C then:T else:T -> T", _expect_one_rank, C="i1", T=_TENSOR),
    "shape": _Rule("input:T -> S", _shape, T=_ALL, S=_SHAPE),
    "slice": _Rule("input:T start:S size:S stride:S fill:T? -> T", _slice, T=_TENSOR, S=_SHAPE),
    "softmax": _Rule("input:T -> T", _expect_axis, _expect_same_shape, T=_FLOATS),
    "top_k": _Rule("input:T -> T I", _top_k, T=f"i32 i64 {_FLOATS}", I="i32"),
    "transpose": _Rule("input:T -> T", _transpose, T=_ALL),
    "unary": _Rule("input:T -> T", _unary, _expect_same_shape, T=_TENSOR),
}

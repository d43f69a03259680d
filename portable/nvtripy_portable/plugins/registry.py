"""The registry: from a plug-in's name, version and namespace to its meaning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nvtripy_portable.plugins.native import INTEGERS, NUMBERS, TEXT, Described, Function, Native

#: How many inputs: a number, the least and the greatest number, or None for any.
Count = int | tuple[int, int] | None

#: What a field's values can be, and as what native functions get them.
FIELD_TYPES = (
    dict.fromkeys(("int4", "int8", "int16", "int32", "int64", "dims"), INTEGERS)
    | dict.fromkeys(("float8", "float16", "bfloat16", "float32", "float64"), NUMBERS)
    | {"text": TEXT}
)

_REQUIRED = object()


class PluginError(RuntimeError):
    """A plug-in that is not registered, or whose function failed or gave what it had not promised."""


@dataclass(frozen=True)
class Field:
    """What a plug-in takes beside its inputs.

    Args:
        type: One of ``FIELD_TYPES``: "int32", "float32", ..., "text" for a string, "dims" for any number of sizes.
        length: How many values; 0 for any number. With a length other than 1 a function gets a tuple.
        default: The value where none is given; without it, one has to be.
    """

    type: str
    length: int = 1
    default: Any = _REQUIRED

    def __post_init__(self) -> None:
        if self.type not in FIELD_TYPES:
            raise ValueError(f"expected a field's type to be one of {', '.join(FIELD_TYPES)} but got {self.type!r}")
        if self.length < 0 or (self.type in ("text", "dims") and self.length != 1):
            raise ValueError(f"expected a field of type {self.type} to have another length than {self.length}")

    @property
    def is_required(self) -> bool:
        """Whether a value has to be given."""
        return self.default is _REQUIRED

    def value(self, given: Any) -> Any:
        """A value as functions get it: one number, a string, or a tuple."""
        if self.type == "text":
            return given
        convert = int if FIELD_TYPES[self.type] == INTEGERS else float
        values = tuple(map(convert, given if isinstance(given, Sequence) else (given,)))
        return values[0] if self.length == 1 and self.type != "dims" else values

    def described(self, name: str, value: Any) -> Described:
        """A value as native functions get it."""
        kind = FIELD_TYPES[self.type]
        if kind == TEXT:
            return name, kind, value.encode()
        return name, kind, value if isinstance(value, tuple) else (value,)


@dataclass(frozen=True)
class Plugin:
    """A plug-in's meaning, as :func:`register` took it."""

    name: str
    version: str
    namespace: str
    fields: Mapping[str, Field]
    inputs: Count
    outputs: int
    compute: Callable[..., Any] | None
    native: Native | None
    shapes: Callable[..., Any] | None
    rows: bool | tuple[int, ...]
    has_effects: bool

    def __str__(self) -> str:
        return describe(self.name, self.version, self.namespace)

    def has_rows(self, number: int) -> bool:
        """Whether an input's leading dimensions are rows, each of which the same row of the results depends on."""
        return self.rows is True or (self.rows is not False and number in self.rows)

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All fields by their names, as functions get them.

        Raises:
            PluginError: one without a default is missing, or there is no such field.
        """
        unknown = sorted(set(given) - set(self.fields))
        missing = [name for name, field in self.fields.items() if field.is_required and name not in given]
        if unknown or missing:
            what = f"no field {unknown[0]!r}" if unknown else f"a value for the field {missing[0]!r}"
            raise PluginError(f"{self}: expected {what}; its fields are {', '.join(self.fields) or 'none'}")
        return {name: field.value(given.get(name, field.default)) for name, field in self.fields.items()}

    def described(self, fields: Mapping[str, Any]) -> list[Described]:
        """All fields as native functions get them."""
        return [field.described(name, fields[name]) for name, field in self.fields.items()]


_registered: dict[tuple[str, str, str], Plugin] = {}


def register(
    name: str,
    *,
    compute: Callable[..., Any] | None = None,
    native: Function | None = None,
    shapes: Callable[..., Any] | None = None,
    fields: Mapping[str, Field | str] | None = None,
    inputs: Count = None,
    outputs: int = 1,
    row_wise: bool | Sequence[int] = False,
    has_effects: bool = False,
    context: int = 0,
    version: str = "1",
    namespace: str = "",
    replace: bool = False,
) -> None:
    """Gives a plug-in a meaning, for whatever is compiled, loaded or evaluated from now on in this process.

    Args:
        name: As ``nvtripy.plugin`` is given it; likewise ``version`` and ``namespace``.
        compute: ``compute(*arrays, **fields)`` gives the output, or a tuple of several, as NumPy arrays of the types
            that the call names. The inputs are read-only. Without it, ``native`` is called on arrays, too.
        native: The same in C: a function pointer of ctypes, or the path of a shared library and a symbol in it.
        shapes: ``shapes(*shapes, **fields)`` gives the output's shape, or a list of several, as tuples. While something
            is compiled, dimensions may be symbols, which can be added, subtracted, multiplied and divided (``//``);
            where it raises on these, or gives None for a dimension, that is known at run time only. None: every output
            has the first input's shape.
        fields: By their names; a type's name alone stands for one value of it that has to be given.
        inputs: How many there are, the least and the greatest number, or None for any.
        outputs: How many there are.
        row_wise: That row i of each output depends on nothing but row i of each input, rows being all dimensions but
            the last: a decoder may then pack any rows. True: all inputs have rows; or the numbers of those that do,
            where the others (weights, say) are whole. A native function gets what has rows as (rows, width).
        has_effects: That a call does more than compute its outputs: it is kept where nobody reads them, and calls stay
            in order. (nvtripy traces back from what a function returns: what is to be called must be part of that.)
        context: An address that the native function is given, of something that stays where it is.
        replace: Whether another meaning of that name gives way. What has run already keeps the native function it had.

    Raises:
        ValueError: it has another meaning already, or the arguments contradict each other.
        OSError: the library cannot be loaded.
        AttributeError: it has no such symbol.
    """
    if compute is None and native is None:
        raise ValueError(f"expected plug-in {name!r} to have a function, in NumPy or native")
    if outputs < 1:
        raise ValueError(f"expected plug-in {name!r} to have at least one output but got {outputs}")
    plugin = Plugin(
        name,
        version,
        namespace,
        {each: Field(field) if isinstance(field, str) else field for each, field in (fields or {}).items()},
        inputs,
        outputs,
        compute,
        None if native is None else Native.of(native, context),
        shapes,
        row_wise if isinstance(row_wise, bool) else tuple(row_wise),
        has_effects,
    )
    key = (name, version, namespace)
    if not replace and _registered.get(key, plugin) != plugin:
        raise ValueError(f"{plugin} is registered with another meaning; replace=True puts this one in its place")
    _registered[key] = plugin


def unregister(name: str, *, version: str = "1", namespace: str = "") -> None:
    """Takes a plug-in's meaning away.

    Raises:
        PluginError: it has none.
    """
    find(name, version, namespace)
    del _registered[name, version, namespace]


def registered() -> list[str]:
    """What has a meaning, in words, sorted."""
    return sorted(map(str, _registered.values()))


def find(name: str, version: str, namespace: str) -> Plugin:
    """A plug-in's meaning.

    Raises:
        PluginError: it has none; the message names those that have one.
    """
    plugin = _registered.get((name, version, namespace))
    if plugin is None:
        raise PluginError(
            f"{describe(name, version, namespace)} is not registered with nvtripy_portable.plugins; "
            f"what is: {', '.join(registered()) or 'none'}"
        )
    return plugin


def describe(name: str, version: str, namespace: str) -> str:
    """A plug-in in words."""
    within = f", namespace {namespace!r}" if namespace else ""
    return f"plug-in {name!r} (version {version}{within})"

"""Compares variants of a GPT-2: perplexity, speed, size and memory, as a table and a picture.

    python evaluate.py --variants float32 float16 int8-weight-only int4-weight-only+lm-head+kv-int8 --plot variants.png

A variant is words joined by "+": a data type, a quantization mode (in float16, unless a data type is joined), and what
else is quantized; or the folder of a checkpoint. The first one is what the others are compared with. The table goes to
standard output, everything else to standard error.

The way of the data: text → token ids; for each variant a checkpoint (quantized and kept by quantization.py) → the
compiled stateless model → negative log-likelihoods → perplexity, and the compiled cached model, saved → a fresh process
that opens it and generates → speed and peak memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np

import quantization
from quantization import QuantizationConfig, QuantizationError
from weight_loader import PARAMETER_DTYPES, Checkpoint, CheckpointConfig, CheckpointError, open_checkpoint, read_json

if TYPE_CHECKING:
    import nvtripy as tp

    from model import GPT, GPTConfig

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent
HELD_OUT_TEXT = quantization.EMBEDDED_CHECKPOINT / "held-out.txt"
REQUIREMENTS = ROOT / "requirements-evaluate.txt"

DTYPES = PARAMETER_DTYPES
MODIFIERS: dict[str, dict[str, Any]] = {
    "lm-head": {"quant_lm_head": True},
    "per-channel": {"per_channel": True},
    "per-token": {"per_token": True},
    "kv-int8": {"kv_cache_dtype": "int8"},
    "kv-fp8": {"kv_cache_dtype": "fp8"},
}
WORDS = (*DTYPES, *quantization.MODES, *MODIFIERS)
DEFAULT_DTYPES = ("float32", "float16")

BATCH_TOKENS = 2048  # that go through the model together: speed against memory
BATCH_LOGITS = 1 << 26  # as many logits at most, unless one window has more
PROMPT_TOKENS = 32  # of the speed run, or half of the context where that is shorter
PICTURE_SUFFIXES = (".png", ".svg")


class UsageError(Exception):
    """The command cannot be carried out as given; one line says what was expected and what came."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage that argparse would print before it."""
        raise UsageError(message)


# ---- the command line ------------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as it can be without a checkpoint.

    Raises:
        UsageError: an unknown option or variant, or a value out of its range.
    """
    parser = _Parser(
        prog="evaluate.py",
        description="Compare variants of a GPT-2: perplexity, speed, size, memory.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model-type",
        metavar="NAME",
        default=quantization.EMBEDDED_CHECKPOINT,
        help="a folder in HuggingFace's format, or a hub name such as gpt2 (default: the embedded checkpoint)",
    )
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit at the hub")
    parser.add_argument(
        "--variants",
        metavar="V",
        nargs="+",
        help=f"words of {', '.join(WORDS)}, joined by '+'; or a checkpoint folder (default: {' '.join(DEFAULT_DTYPES)} "
        "and, as far as they can be had, the quantization modes)",
    )
    parser.add_argument(
        "--data",
        metavar="FILE|DATASET",
        help="a UTF-8 text, or a data set at the hub (default: what the embedded checkpoint was not trained on)",
    )
    parser.add_argument(
        "--max-tokens",
        metavar="N",
        type=int,
        default=16384,
        help="of the text's start; 0: all of it (default %(default)s)",
    )
    parser.add_argument("--context", metavar="N", type=int, help="tokens of a window (default: the model's context)")
    parser.add_argument(
        "--stride", metavar="N", type=int, help="tokens from one window to the next (default: half the window)"
    )
    parser.add_argument(
        "--new-tokens", metavar="N", type=int, default=128, help="generated to measure speed (default %(default)s)"
    )
    parser.add_argument(
        "--runs",
        metavar="N",
        type=int,
        default=3,
        help="of the speed measurement; the median counts (default %(default)s)",
    )
    parser.add_argument("--format", choices=tuple(FORMATS), default="text", help="of the table (default %(default)s)")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="perplexity against size as a .png or .svg picture")
    calibration = parser.add_argument_group("calibration of quantized variants, as in quantization.py")
    calibration.add_argument("--calib-data", metavar="FILE|DATASET")
    calibration.add_argument("--calib-size", metavar="N", type=int, default=quantization.CALIB_SIZE)
    calibration.add_argument("--calib-length", metavar="N", type=int)
    options = parser.parse_args(arguments)
    for name, least in (("max_tokens", 0), ("context", 1), ("stride", 1), ("new_tokens", 2), ("runs", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UsageError(f"expected --{name.replace('_', '-')} to be at least {least} but got {value}")
    if options.max_tokens == 1:
        raise UsageError("expected --max-tokens to be at least 2, or 0 for all, but got 1")
    options.parsed_variants = [parse_variant(text, options) for text in options.variants or ()]
    return options


@dataclass(frozen=True)
class Variant:
    """What is evaluated: how it is quantized, or where it lies, and in which type it is computed."""

    name: str
    dtype: str = "float16"
    quantization: QuantizationConfig | None = None
    folder: Path | None = None


def parse_variant(text: str, options: argparse.Namespace) -> Variant:
    """A variant by its name.

    Raises:
        UsageError: words that no variant has, or that do not go together.

    >>> parse_variant("int8-weight-only+kv-fp8", parse_arguments([])).quantization.kv_cache_dtype
    'fp8'
    """
    head, _, tail = text.rpartition("+")
    path, dtype = (head, tail) if tail in DTYPES and not os.path.isdir(text) else (text, "float16")
    if os.path.isdir(os.path.expanduser(path)) or any(mark in path for mark in ("/", os.sep)) or path[:1] in (".", "~"):
        return Variant(text, dtype, folder=Path(path).expanduser())
    words = text.split("+")
    for word in words:
        if word not in WORDS:
            raise UsageError(
                f"unknown variant {text!r}: expected a folder, or words of {', '.join(WORDS)}, joined by '+'"
            )
    kinds = {
        "data type": [word for word in words if word in DTYPES],
        "quantization mode": [word for word in words if word in quantization.MODES],
        "KV cache type": [word for word in words if word.startswith("kv-")],
    }
    for kind, chosen in kinds.items():
        if len(chosen) > 1:
            raise UsageError(f"expected one {kind} in a variant but got {len(chosen)} in {text!r}")
    dtypes, modes, _ = kinds.values()
    dtype = dtypes[0] if dtypes else "float16"
    if len(words) == len(dtypes):
        return Variant(text, dtype)
    settings: dict[str, Any] = {name: value for word in words for name, value in MODIFIERS.get(word, {}).items()}
    try:
        config = QuantizationConfig(
            mode=modes[0] if modes else None,
            calib_data=options.calib_data,
            calib_size=options.calib_size,
            calib_length=options.calib_length,
            **settings,
        )
    except QuantizationError as error:
        raise UsageError(f"variant {text!r}: {error}") from None
    return Variant(text, dtype, config)


def check_picture(path: Path) -> None:
    """Proves, before any long work, that a picture can be drawn and written.

    Raises:
        UsageError: it cannot.
    """
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise UsageError(f"expected --plot to end in {' or '.join(PICTURE_SUFFIXES)} but got {path}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError(f"--plot needs matplotlib ({error}): pip install -r {REQUIREMENTS.name}") from None
    if path.is_dir():
        raise UsageError(f"expected a file to write with --plot but {path} is a folder")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


# ---- text and checkpoints --------------------------------------------------------------------------------------------


def read_text(data: str | None, max_tokens: int) -> tuple[str, str]:
    """The text to evaluate on, and its name.

    Raises:
        UsageError: there is none, or it is not text.
    """
    # Of a data set as many documents as are sure to do; what is too much is cut off as tokens.
    documents = max(32, max_tokens // 64) if max_tokens else 1 << 16
    source = QuantizationConfig(
        mode=quantization.MODES[0], calib_data=str(HELD_OUT_TEXT) if data is None else data, calib_size=documents
    )
    try:
        text, name = quantization.calibration_text(source)
    except QuantizationError as error:
        message = str(error).replace("the calibration text", "the text").replace(" to calibrate on", "")
        raise UsageError(message) from None
    return text, HELD_OUT_TEXT.relative_to(ROOT).as_posix() if data is None else name


def open_variants(options: argparse.Namespace) -> list[tuple[Variant, Checkpoint]]:
    """The variants with their checkpoints, quantized where that is needed.

    Raises:
        QuantizationError, CheckpointError: a variant that was asked for cannot be had.
    """
    source = open_checkpoint(options.model_type, options.revision)
    is_quantized = source.config.quant_mode is not None or source.config.kv_cache_dtype is not None
    if options.parsed_variants:
        return [(variant, _open_variant(variant, source)) for variant in options.parsed_variants]
    found = [(Variant(dtype, dtype), source) for dtype in DEFAULT_DTYPES]
    for mode in () if is_quantized else quantization.MODES:
        variant = parse_variant(mode, options)
        try:
            found.append((variant, _open_variant(variant, source)))
        except QuantizationError as error:
            _report(f"left out {mode}: {error}")
    return found


def _open_variant(variant: Variant, source: Checkpoint) -> Checkpoint:
    if variant.folder is not None:
        return open_checkpoint(variant.folder)
    if variant.quantization is None:
        return source
    return open_checkpoint(quantization.cached_checkpoint(source, variant.quantization, report=_report))


def encode(text: str, name: str, max_tokens: int, variants: Sequence[tuple[Variant, Checkpoint]]) -> np.ndarray:
    """Token ids of the text, (tokens,) int32.

    Raises:
        UsageError: there are not two of them, or two variants' tokenizers disagree on them.
        CheckpointError: a tokenizer cannot be used.
    """
    from tokenizer import load_tokenizer

    found: dict[Path, np.ndarray] = {}
    for variant, checkpoint in variants:
        if checkpoint.path in found:
            continue
        tokenizer = load_tokenizer(checkpoint.path, checkpoint.config.vocab_size)
        ids = np.array(tokenizer.encode(text)[: max_tokens or None], dtype=np.int32)
        first = found.setdefault(checkpoint.path, ids) if not found else next(iter(found.values()))
        if not np.array_equal(first, ids):
            raise UsageError(
                f"expected variants with the same tokenizer but {variant.name} and {variants[0][0].name} differ"
            )
        found[checkpoint.path] = ids
    ids = next(iter(found.values()))
    if len(ids) < 2:
        raise UsageError(f"expected a text of at least 2 tokens but {name} has {len(ids)}")
    return ids


# ---- perplexity ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """Tokens ``start`` to ``stop`` go through the model; those from ``scored`` on predict a token that counts."""

    start: int
    stop: int
    scored: int


def windows(predictions: int, context: int, stride: int) -> Iterator[Window]:
    """Windows that together predict each token after the first once, the earliest that can doing it.

    >>> list(windows(10, context=6, stride=3))
    [Window(start=0, stop=6, scored=0), Window(start=3, stop=9, scored=6), Window(start=6, stop=10, scored=9)]
    """
    start = done = 0
    while done < predictions:
        stop = min(start + context, predictions)
        yield Window(start, stop, done)
        done = stop
        start += stride


def negative_log_likelihoods(
    logits_of: Callable[[np.ndarray], np.ndarray],
    batch: int,
    ids: np.ndarray,
    context: int,
    stride: int,
    name: str = "",
) -> np.ndarray:
    """How unlikely the model finds each token after the first, given those before it in its window.

    Args:
        logits_of: From token ids (batch, tokens) int32 the float32 logits (batch, tokens, V). It is always given the
            same shape, shorter windows padded on the right, where a causal model does not look.
        batch: How many windows it takes together.
        ids: The text, (N,) int32.
        context: Tokens of a window, or N - 1 where that is less.
        stride: How far windows are apart, at most ``context``: all tokens but the first window's are predicted from at
            least ``context - stride + 1`` others.
        name: For the progress bar.

    Returns:
        Nats, (N - 1,) float64.
    """
    from tqdm import tqdm

    size = min(context, len(ids) - 1)
    todo = list(windows(len(ids) - 1, size, stride))
    nats = np.empty(len(ids) - 1, dtype=np.float64)
    with tqdm(desc=name, total=len(nats), unit="token", leave=False, file=sys.stderr) as progress:
        for begin in range(0, len(todo), batch):
            group = todo[begin : begin + batch]
            idx = np.zeros((batch, size), dtype=np.int32)
            for row, window in enumerate(group):
                idx[row, : window.stop - window.start] = ids[window.start : window.stop]
            logits = logits_of(idx)
            for row, window in enumerate(group):
                targets = ids[window.scored + 1 : window.stop + 1]
                scored = logits[row, window.scored - window.start : window.stop - window.start]
                nats[window.scored : window.stop] = _cross_entropy(scored, targets)
                progress.update(len(targets))
    return nats


def _cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[targets] in float64, by rows: (T, V), (T,) → (T,)."""
    result = np.empty(len(targets), dtype=np.float64)
    rows = max(1, (1 << 22) // logits.shape[1])  # some 32 MB at a time
    for begin in range(0, len(targets), rows):
        part = logits[begin : begin + rows].astype(np.float64)
        part -= part.max(axis=1, keepdims=True)
        chosen = part[np.arange(len(part)), targets[begin : begin + rows]]
        result[begin : begin + rows] = np.log(np.exp(part).sum(axis=1)) - chosen
    return result


def perplexity(nats: np.ndarray) -> float:
    """exp of the mean; infinite where that overflows."""
    with np.errstate(over="ignore"):
        return float(np.exp(nats.mean()))


def stateless_model(gpt: GPT, tokens: int, num_windows: int) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
    """The compiled stateless forward, as :func:`negative_log_likelihoods` wants it, and its batch."""
    import nvtripy as tp

    fitting = min(BATCH_TOKENS // tokens, BATCH_LOGITS // (tokens * gpt.config.vocab_size), num_windows)
    batch = max(1, fitting)
    stderr = sys.stderr  # nvtripy leaves a block-buffered copy of it whenever it compiles
    try:
        executable = tp.compile(gpt, args=[tp.InputInfo((batch, tokens), dtype=tp.int32)])
    finally:
        sys.stderr = stderr

    def logits_of(idx: np.ndarray) -> np.ndarray:
        logits = executable(tp.copy(tp.Tensor(idx), tp.device("gpu")))
        return np.from_dlpack(tp.copy(logits, tp.device("cpu")))

    return logits_of, batch


# ---- weights ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the weights; ``layers`` are those of the quantized layers, or of the blocks' linear ones if none is.

    With their scales, without their biases. None where it cannot be told.
    """

    total: int | None = None
    layers: int | None = None
    num_weights: int = 0  # of those layers

    @property
    def to_float16(self) -> float | None:
        """The layers' bytes relative to the same weights at two bytes each."""
        return None if self.layers is None else self.layers / (2 * self.num_weights)


def _linear_layers(config: CheckpointConfig) -> dict[str, int]:
    """How many weights each linear layer of the blocks has, by HuggingFace's names, in the order of the data."""
    embd, inner = config.n_embd, config.n_inner
    sizes = {"attn.c_attn": 3 * embd * embd, "attn.c_proj": embd * embd, "mlp.c_fc": embd * inner}
    sizes["mlp.c_proj"] = inner * embd
    return {f"h.{block}.{name}": size for block in range(config.n_layer) for name, size in sizes.items()}


def stored_weight_bytes(checkpoint: Checkpoint) -> WeightBytes:
    """The tensors in a checkpoint's files.

    Raises:
        CheckpointError: a file cannot be read.
    """
    tensors = _stored_tensors(checkpoint.path)
    if tensors is None:  # PyTorch's own files, which are never quantized
        return WeightBytes(sum(path.stat().st_size for path in checkpoint.path.glob("pytorch_model*.bin")))
    layers = _linear_layers(checkpoint.config)
    scaled = {name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")}
    if scaled:
        shared = checkpoint.config.vocab_size * checkpoint.config.n_embd
        layers = {name: layers.get(name, shared) for name in scaled}
    parts = ("weight", "weight_scale", "input_scale", "pre_quant_scale")
    in_layers = sum(tensors.get(f"{layer}.{part}", 0) for layer in layers for part in parts)
    return WeightBytes(sum(tensors.values()), in_layers, sum(layers.values()))


def _stored_tensors(folder: Path) -> dict[str, int] | None:
    """Bytes of each tensor in a folder's safetensors files, by name; None where there are none."""
    from safetensors import SafetensorError, safe_open

    files = [folder / "model.safetensors"]
    if not files[0].is_file():
        index = folder / "model.safetensors.index.json"
        if not index.is_file():
            return None
        files = [folder / shard for shard in sorted(set(read_json(index)["weight_map"].values()))]
    bits = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "I8": 8, "U8": 8, "BOOL": 8}
    tensors = {}
    try:
        for file in files:
            with safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is not a dict
                    entry = opened.get_slice(name)
                    size = math.prod(entry.get_shape()) * bits[entry.get_dtype()] // 8
                    tensors[name.removeprefix("transformer.")] = size
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"cannot read the tensors in {folder}: {error}") from None
    return tensors


def compiled_weight_bytes(executable: tp.Executable, config: CheckpointConfig) -> WeightBytes:
    """The constants of a compiled model. The portable runtime's executables can be looked into, TensorRT's cannot."""
    try:
        from nvtripy_portable.executable import FormatError, deserialize
    except ImportError:
        return WeightBytes()
    try:
        graph = deserialize(executable.serialized_tensorrt_engine).graph
    except FormatError:
        return WeightBytes()
    constants = [operation.results[0] for operation in graph.operations if operation.kind == "constant"]
    total = sum(map(_constant_bytes, constants))
    sizes = list(_linear_layers(config).values())
    layers = [operation for operation in graph.operations if operation.kind == "linear"]
    if [_num_weights(layer) for layer in layers[: len(sizes)]] != sizes:
        return WeightBytes(total)  # the runtime has left some layers in pieces
    # The blocks' layers come in the order of the data, the head last. It counts if it is quantized.
    layers = [layer for place, layer in enumerate(layers) if place < len(sizes) or layer.operands[2] is not None]
    counted = set()
    for layer in layers:
        _, weight, weight_scale, _, _, pre_scale, input_scale = layer.operands
        counted.update({weight, weight_scale, pre_scale, input_scale} - {None})
    return WeightBytes(total, sum(map(_constant_bytes, counted)), sum(map(_num_weights, layers)))


def _num_weights(linear: Any) -> int:
    """How many weights a linear layer of the compiled graph has: rows, one an output feature, of its width."""
    return linear.operands[1].type.shape[0] * linear.attributes["width"]


def _constant_bytes(value: Any) -> int:
    bits = 4 if value.type.dtype == "i4" else 8 * value.constant.dtype.itemsize
    return int((value.constant.size * bits + 7) // 8)


# ---- speed -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """Medians of the runs, and the peak of the process that opened the saved engine and ran them."""

    tokens_per_second: float | None  # None where the context leaves no room for two tokens
    first_token_seconds: float
    peak_memory_bytes: int


def measure_speed(saved_engine: str, config: GPTConfig, prompt: list[int], new_tokens: int, runs: int) -> Speed:
    """Generates from a saved engine, with sampling as example.py does it. For a process of its own."""
    from engine import Engine
    from generation import Sampler, generate
    from nvtripy_portable import engine_file

    engine = Engine(engine_file.load(saved_engine), config, 1)
    rates, firsts = [], []
    for run in range(runs + 1):  # the first one warms up
        started = time.perf_counter()
        first, count = 0.0, 0
        for _ in generate(engine, [prompt], [Sampler(seed=run)], new_tokens if run else 2, set()):
            first = first or time.perf_counter()
            count += 1
        if run:
            firsts.append(first - started)
            if count > 1:
                rates.append((count - 1) / (time.perf_counter() - first))
    return Speed(statistics.median(rates) if rates else None, statistics.median(firsts), peak_memory_bytes())


def peak_memory_bytes() -> int:
    """The most memory that this process has had resident.

    Linux's ru_maxrss would begin with the size of the process that started this one.
    """
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_apart(function: Callable[..., T], *arguments: Any) -> T:
    """Calls a function in a fresh process, which shares no memory with this one.

    Raises:
        UsageError: the process was killed.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise UsageError("the process that measures speed was killed: is there enough memory?") from None


# ---- all of it -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What all variants have in common."""

    text: str
    tokens: int
    context: int  # of the windows
    stride: int
    prompt_tokens: int
    new_tokens: int
    runs: int
    machine: str
    cores: int
    nvtripy: str

    def __str__(self) -> str:
        return (
            f"{self.text}, {self.tokens} tokens in windows of {self.context}, stride {self.stride}; speed: "
            f"{self.new_tokens} tokens after a prompt of {self.prompt_tokens}, batch 1, median of {self.runs}; "
            f"{self.machine}, {self.cores} cores, nvtripy {self.nvtripy}"
        )


@dataclass(frozen=True)
class Result:
    """The measurements of one variant; None where there is none."""

    variant: str
    dtype: str
    perplexity: float
    ratio: float  # of the perplexity to the first variant's
    speed: Speed
    disk: WeightBytes
    memory: WeightBytes

    def as_json(self) -> dict[str, Any]:
        return {
            "variant": self.variant,
            "dtype": self.dtype,
            "perplexity": _finite(self.perplexity),
            "ratio": _finite(self.ratio),
            **asdict(self.speed),
            **_weights_as_json("disk", self.disk),
            **_weights_as_json("memory", self.memory),
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no other numbers


def _weights_as_json(where: str, weights: WeightBytes) -> dict[str, Any]:
    bits = None if weights.layers is None else 8 * weights.layers / weights.num_weights
    return {
        f"{where}_bytes": weights.total,
        f"{where}_layers_bytes": weights.layers,
        f"{where}_layers_to_float16": weights.to_float16,
        f"{where}_bits_per_weight": bits,
    }


def machine() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as info:
        for line in info:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def settle(options: argparse.Namespace, text: str, ids: np.ndarray, checkpoints: Sequence[Checkpoint]) -> Settings:
    """The settings, what was left open in the options filled in.

    Raises:
        UsageError: a window that is longer than a variant's context, or a stride that is longer than the window.
    """
    longest = min(checkpoint.config.n_positions for checkpoint in checkpoints)
    context = options.context or longest
    if context > longest:
        raise UsageError(f"expected --context to be at most the model's context of {longest} but got {context}")
    stride = options.stride or max(1, context // 2)
    if stride > context:
        raise UsageError(f"expected --stride to be at most the window of {context} tokens but got {stride}")
    prompt = min(PROMPT_TOKENS, max(1, longest // 2), len(ids))
    return Settings(
        text=text,
        tokens=len(ids),
        context=min(context, len(ids) - 1),
        stride=stride,
        prompt_tokens=prompt,
        new_tokens=min(options.new_tokens, longest - prompt + 1),
        runs=options.runs,
        machine=machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        nvtripy=metadata.version("nvtripy"),
    )


def evaluate(variant: Variant, checkpoint: Checkpoint, ids: np.ndarray, settings: Settings) -> Result:
    """Measures one variant; its ratio is left at 1.

    Raises:
        CheckpointError: its weights cannot be loaded.
        UsageError: nvtripy cannot compile it.
    """
    import nvtripy as tp

    from engine import compile_model, config_of, load_model
    from nvtripy_portable import engine_file

    config = config_of(checkpoint, variant.dtype)
    try:
        gpt = load_model(checkpoint, config)
        with tempfile.TemporaryDirectory() as folder:
            executable = compile_model(gpt, 1)
            memory = compiled_weight_bytes(executable, checkpoint.config)
            file = str(Path(folder) / "engine")
            engine_file.save(executable, file)
            del executable
            prompt = ids[: settings.prompt_tokens].tolist()
            speed = run_apart(measure_speed, file, config, prompt, settings.new_tokens, settings.runs)
        num_windows = sum(1 for _ in windows(len(ids) - 1, settings.context, settings.stride))
        logits_of, batch = stateless_model(gpt, settings.context, num_windows)
    except tp.TripyException as error:
        raise UsageError(f"variant {variant.name} cannot be compiled: {str(error).strip().splitlines()[-1]}") from None
    nats = negative_log_likelihoods(logits_of, batch, ids, settings.context, settings.stride, variant.name)
    return Result(variant.name, variant.dtype, perplexity(nats), 1.0, speed, stored_weight_bytes(checkpoint), memory)


# ---- output ----------------------------------------------------------------------------------------------------------

COLUMNS = (
    "variant",
    "perplexity",
    "ratio",
    "tokens/s",
    "first token, ms",
    "disk, MB",
    "disk/fp16",
    "memory, MB",
    "memory/fp16",
    "peak, MB",
)
NOTE = (
    "disk, memory: the weights in the checkpoint's files and in the compiled model. /fp16: those of the quantized or, "
    "where none is, of the linear layers, with their scales, relative to two bytes a weight. peak: memory of a process "
    "that opens the saved engine and generates."
)


def _cells(result: Result) -> list[str]:
    def shown(value: float | None, form: str, factor: float = 1.0) -> str:
        return "-" if value is None else format(value * factor, form)

    return [
        result.variant,
        shown(result.perplexity, ".3f" if result.perplexity < 1e5 else ".4g"),
        shown(result.ratio, ".4f" if result.ratio < 1e5 else ".4g"),
        shown(result.speed.tokens_per_second, ".1f"),
        shown(result.speed.first_token_seconds, ".1f", 1e3),
        shown(result.disk.total, ".2f", 1e-6),
        shown(result.disk.to_float16, ".3f"),
        shown(result.memory.total, ".2f", 1e-6),
        shown(result.memory.to_float16, ".3f"),
        shown(result.speed.peak_memory_bytes, ".0f", 1e-6),
    ]


def _rows(results: Sequence[Result]) -> list[list[str]]:
    """The table's cells, padded to the width of their columns: names on the left, numbers on the right."""
    rows = [list(COLUMNS), *map(_cells, results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        [
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]


def as_text(settings: Settings, results: Sequence[Result]) -> str:
    """An aligned table under a line that says how it was measured."""
    rows = ["  ".join(row) for row in _rows(results)]
    width = len(rows[0])
    return "\n".join([*textwrap.wrap(str(settings), width), "", *rows, "", *textwrap.wrap(NOTE, width)])


def as_markdown(settings: Settings, results: Sequence[Result]) -> str:
    """The same in Markdown."""
    head, *body = (f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in _rows(results))
    rule = f"|:---|{'---:|' * (len(COLUMNS) - 1)}"
    return "\n".join([f"{settings}.", "", head, rule, *body, "", NOTE])


def as_json(settings: Settings, results: Sequence[Result]) -> str:
    """Everything, in bytes and seconds, unrounded; null where there is no number."""
    return json.dumps({"settings": asdict(settings), "variants": [each.as_json() for each in results]}, indent=2)


COLORS = dict(zip(quantization.MODES, ("#1b6ca8", "#c44e00", "#2a7f3f", "#8a3ab9"), strict=True))
FORMATS = {"text": as_text, "markdown": as_markdown, "json": as_json}


def draw(settings: Settings, results: Sequence[Result], path: Path) -> None:
    """Writes a picture of perplexity against size, beside its place first, so that it is never half-written.

    Raises:
        UsageError: it cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    in_memory = all(result.memory.total is not None for result in results)
    points = [
        (size / 1e6, result.perplexity, result.variant)
        for result in results
        for size in [result.memory.total if in_memory else result.disk.total]
        if size is not None and math.isfinite(result.perplexity)
    ]
    with matplotlib.rc_context({"svg.hashsalt": "evaluate", "font.size": 11, "text.parse_math": False}):
        figure = Figure(figsize=(9, 5.5), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)  # which measures text, and needs no display
        axes = figure.add_subplot()
        axes.margins(0.14, 0.16)
        for x, y, name in points:
            axes.plot([x], [y], "o", markersize=9, color=_color(name))
        axes.set_xlabel(f"weights {'in memory' if in_memory else 'on disk'}, MB")
        axes.set_ylabel("perplexity (lower is better)")
        axes.set_title(
            f"{settings.text}, {settings.tokens} tokens, window {settings.context}, stride {settings.stride}"
        )
        axes.ticklabel_format(useOffset=False)
        axes.grid(color="#dddddd")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        _label(axes, points)
        handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        try:
            form = path.suffix.lower().removeprefix(".")
            figure.savefig(partial, format=form, metadata={"Date": None} if form == "svg" else None)
            os.chmod(partial, 0o644)  # mkstemp makes it for its owner alone
            os.replace(partial, path)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}") from None
        finally:
            Path(partial).unlink(missing_ok=True)


def _color(variant: str) -> str:
    """One for each quantization mode."""
    return next((COLORS[word] for word in variant.split("+") if word in COLORS), "#555555")


def _label(axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Names points, each as near to its point as no other name or point is in the way, with a line if it is far."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    figure = axes.figure
    figure.draw_without_rendering()  # which settles where everything is
    renderer, pixels = figure.canvas.get_renderer(), figure.dpi / 72
    frame = axes.get_window_extent(renderer)
    centers = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken = [Bbox.from_extents(x - 6 * pixels, y - 6 * pixels, x + 6 * pixels, y + 6 * pixels) for x, y in centers]
    turns = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]
    sides = {1: "left", 0: "center", -1: "right"}
    line = {"arrowstyle": "-", "linewidth": 0.7, "shrinkA": 1, "shrinkB": 5}
    heights = {1: "bottom", 0: "center", -1: "top"}
    places = [(turn, distance) for distance in range(9, 300, 9) for turn in turns]
    for x, y, name in sorted(points):
        for (right, up), distance in [*places, (turns[0], 9)]:  # the last one, if there is no room at all
            is_near = distance == 9 and 0 in (right, up)
            corner = (0.5 - right / 2, 0.5 - up / 2)  # of the text, where a line to the point begins
            label = axes.annotate(
                name,
                (x, y),
                xytext=(right * distance, up * distance),
                textcoords="offset points",
                ha=sides[right],
                va=heights[up],
                color=_color(name),
                arrowprops=None if is_near else {**line, "color": _color(name), "relpos": corner},
            )
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer)  # an annotation's own includes its line
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            label.remove()
        else:
            axes.add_artist(label)


def run(options: argparse.Namespace) -> None:
    """Carries out the command."""
    if options.plot is not None:
        check_picture(options.plot)
    text, name = read_text(options.data, options.max_tokens)
    variants = open_variants(options)
    ids = encode(text, name, options.max_tokens, variants)
    settings = settle(options, name, ids, [checkpoint for _, checkpoint in variants])
    results: list[Result] = []
    for number, (variant, checkpoint) in enumerate(variants, 1):
        _report(f"{variant.name} ({number} of {len(variants)})")
        result = evaluate(variant, checkpoint, ids, settings)
        first = results[0].perplexity if results else result.perplexity
        results.append(replace(result, ratio=result.perplexity / first))
    print(FORMATS[options.format](settings, results), flush=True)
    if options.plot is not None:
        draw(settings, results, options.plot)


def _report(message: str) -> None:
    print(message, file=sys.stderr)


def main() -> int:
    """Exit code 0, or 2 after one line on standard error for input that cannot be used."""
    if sys.stdout is None:
        return _fail("standard output is closed")
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    try:
        try:
            run(parse_arguments())
        finally:
            sys.stdout.flush()  # --help, which leaves by SystemExit, has not done so
    except (UsageError, CheckpointError, QuantizationError) as error:
        return _fail(str(error))
    except OSError as error:
        # What could not be written is still in the buffer, and the interpreter would try again at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 1  # the reader has gone: nothing more to say
        return _fail(f"{error.filename or 'standard output'}: {error.strerror}")
    except KeyboardInterrupt:
        return 130
    return 0


def _fail(message: str) -> int:
    print("evaluate.py: error:", " ".join(message.split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

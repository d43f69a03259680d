"""HuggingFace GPT-2 checkpoint → the model's parameters, as NumPy arrays by parameter name.

    checkpoint = open_checkpoint("gpt2")             # a hub name, or a local folder
    checkpoint.config.n_layer                        # 12: validated, nothing read but JSON and tensor headers so far
    for name, array in checkpoint.parameters("float16"):
        ...                                          # "wte.weight" (50257, 768) float16, one tensor at a time

A folder that ModelOpt quantized (modelopt_layout.py says what it holds) gives the same parameters, of the values that
its integers stand for, and their scales.

Neither torch nor transformers is needed, except that an old `pytorch_model.bin` is read with torch, if it is installed.
Whatever is wrong with a checkpoint raises `CheckpointError`, whose text is one line: what was expected and what came.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
import os
import stat
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import EllipsisType
from typing import Any, NoReturn, Protocol

import numpy as np

import modelopt_layout
from conversion import PARAMETER_DTYPES, convert, numpy_dtype, scaled
from modelopt_layout import DESCRIPTION_FILE, FLOATS, Spec


class CheckpointError(Exception):
    """A checkpoint cannot be used. The text is one line, ready to be shown to the user."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def _reason(error: BaseException, limit: int = 200) -> str:
    """Another library's error as a short single-line clause: its messages can run over whole paragraphs."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


# ---------------------------------------------------------------------------------------------------------------------
# Where the checkpoint is: a local folder, or the HuggingFace hub
# ---------------------------------------------------------------------------------------------------------------------

# The bare names that people type are redirects at the hub; the repositories themselves are these.
HUB_REPOSITORIES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}

# In order of preference, which is also that of transformers.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# What tokenizer.py reads.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


# What ends a text, if a checkpoint has one: config.json's word on that counts no more then.
GENERATION_FILE = "generation_config.json"


def find_tokenizer(name: str) -> Path:
    """The folder of a checkpoint's tokenizer: like `open_checkpoint`, but no weights are needed, nor downloaded.

    Raises:
        CheckpointError: there is no such checkpoint, or it cannot be downloaded.
    """
    return _locate(name, None, with_weights=False)


def open_checkpoint(model_type: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
    """Find, download where needed, and validate a GPT-2 checkpoint. No weight is read yet.

    Args:
        model_type: a folder in HuggingFace's format; or a hub name: "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl",
            "distilgpt2" or any "organization/name". A folder of that name wins; an `os.PathLike` is always a folder.
        revision: branch, tag or commit at the hub (default "main"). Not for folders.

    The hub is reached through `huggingface_hub`, which honours HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and HF_TOKEN; what
    is in its cache already is not downloaded again, and is used when the hub cannot be reached.

    Raises:
        CheckpointError: the checkpoint is absent, cannot be downloaded, or is not a GPT-2 that the model can run.
    """
    return Checkpoint(_locate(model_type, revision, with_weights=True))


def _locate(model_type: str | os.PathLike[str], revision: str | None, with_weights: bool) -> Path:
    """The folder that a name means, downloaded where it is not one already."""
    name = os.fspath(model_type)
    folder = Path(os.path.expanduser(name))
    is_folder, exists = _look_at(folder) if name else (False, False)
    if is_folder:
        if revision is not None:
            raise CheckpointError(
                f"a revision ({revision!r}) was given, but {str(folder)!r} is a folder, not a hub name"
            )
        return folder
    if isinstance(model_type, os.PathLike) or exists or _looks_like_a_path(name):
        found = "it is not a folder" if exists else "there is no such folder"
        raise CheckpointError(f"expected a checkpoint folder at {name!r}, but {found}")
    if name not in HUB_REPOSITORIES and "/" not in name:
        known = ", ".join(HUB_REPOSITORIES)
        raise CheckpointError(
            f"no model {name!r}: expected a checkpoint folder, {known}, or an organization/name at the hub"
        )
    return _download(HUB_REPOSITORIES.get(name, name), revision, with_weights)


#: Of paths that do not exist, or that cannot.
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL)


def _look_at(path: Path) -> tuple[bool, bool]:
    """Whether a path is a folder, and whether it is anything. What may not be looked at is not absent: an error."""
    try:
        mode = os.stat(path).st_mode
    except ValueError:  # a name that no file can have
        return False, False
    except OSError as error:
        if error.errno in _ABSENT:
            return False, False
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    return stat.S_ISDIR(mode), True


def _is_file(path: Path) -> bool:
    """Whether there is such a file. What is there and cannot be one is an error."""
    is_folder, exists = _look_at(path)
    if is_folder:
        raise CheckpointError(f"cannot read {path}: {os.strerror(errno.EISDIR)}")
    return exists


def _looks_like_a_path(name: str) -> bool:
    """Whether `name` can only be meant as a folder: hub names are `name` or `organization/name`."""
    return (
        name == ""
        or name[0] in "./~"
        or name.startswith(os.sep)
        or name.count("/") > 1
        or name[-1] == "/"
        or "\\" in name
    )


def _download(repository: str, revision: str | None, with_weights: bool) -> Path:
    """The cache's folder of a hub repository, with the files that a checkpoint, or its tokenizer, needs in it.

    All files are of one commit: the first request resolves the revision, the others name the commit, so those that are
    cached already cost no request. The small files come first, so that cached weights imply a complete checkpoint.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    asked = f"{repository!r}" if revision is None else f"{repository!r} at revision {revision!r}"
    unreachable: Exception | None = None  # why only the cache is consulted

    def fail(what: str, error: BaseException) -> NoReturn:
        raise CheckpointError(f"{what}: {_reason(error)}") from error

    # One request of our own decides between the hub and the cache: hf_hub_download would try to reach an absent
    # network for half a minute, for each file.
    try:
        if get_hf_file_metadata(hf_hub_url(repository, "config.json", revision=revision)).commit_hash is None:
            unreachable = ConnectionError("the answer is not a hub's (is HF_ENDPOINT right?)")
    except HFValidationError as error:
        fail(f"{repository!r} is not a valid name at the hub", error)
    except RevisionNotFoundError:
        raise CheckpointError(f"the hub has {repository!r}, but not its revision {revision!r}") from None
    except EntryNotFoundError:
        raise CheckpointError(f"{asked} at the hub is not a checkpoint: it has no config.json") from None
    except Exception as error:  # no network, no permission, or whatever a proxy provokes: the cache may do
        unreachable = error

    def fetch(file: str, commit: str | None) -> Path | None:
        """The file's path in the cache, or None where the repository (or, without a hub, the cache) lacks it."""
        if commit is not None:
            cached = try_to_load_from_cache(repository, file, revision=commit)
            if isinstance(cached, str):
                return Path(cached)
            if cached is not None:  # the cache remembers that the repository has no such file
                return None
        try:
            return Path(
                hf_hub_download(repository, file, revision=commit or revision, local_files_only=unreachable is not None)
            )
        except LocalEntryNotFoundError as error:
            if unreachable is None:
                fail(f"the connection to the hub was lost before {file} of {asked} was downloaded", error)
            return None
        except EntryNotFoundError:
            return None
        except Exception as error:
            fail(f"the download of {file} of {asked} failed (run again: complete files are kept)", error)

    config = fetch("config.json", None)
    if config is None:
        if isinstance(unreachable, GatedRepoError):
            raise CheckpointError(
                f"{asked} is gated at the hub: ask for access on its page and set HF_TOKEN"
            ) from unreachable
        if isinstance(unreachable, RepositoryNotFoundError):
            message = (
                f"there is no folder {repository!r}, and no such repository at the hub (or it is private: set HF_TOKEN)"
            )
            raise CheckpointError(message) from unreachable
        if isinstance(unreachable, OfflineModeIsEnabled):
            raise CheckpointError(
                f"{asked} is not in the cache, and HF_HUB_OFFLINE forbids a download"
            ) from unreachable
        fail(
            f"{asked} is not in the cache, and the hub cannot be reached",
            unreachable or FileNotFoundError("config.json"),
        )
    folder = config.parent
    for file in (*TOKENIZER_FILES, GENERATION_FILE, DESCRIPTION_FILE):
        fetch(file, folder.name)
    if not with_weights:
        return folder
    for file in WEIGHT_FILES:
        path = fetch(file, folder.name)
        if path is not None:
            if file.endswith(".index.json"):
                for shard in _shard_names(path):
                    if fetch(shard, folder.name) is None:
                        raise CheckpointError(f"{asked} lacks the shard {shard} that its {file} names")
            return folder
    if unreachable is not None:
        fail(f"the weights of {asked} are not in the cache, and the hub cannot be reached", unreachable)
    return folder  # without weights: Checkpoint says so


# ---------------------------------------------------------------------------------------------------------------------
# config.json
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckpointConfig:
    """The settings that determine the computation, by HuggingFace's names, and the tokens that end a text.

    `activation_function` is one of "gelu_new" (tanh approximation), "gelu" (erf), "relu", "silu"; their aliases are
    resolved. `eos_token_ids` are those of generation_config.json or, where there is no such file, of config.json, in
    rising order, without ids that the vocabulary lacks (the default of 50256 in small models).

    The last nine say how a quantized checkpoint is quantized, by the names of model.py's GPTConfig.
    """

    vocab_size: int
    n_positions: int
    n_layer: int
    n_head: int
    n_embd: int
    n_inner: int
    activation_function: str
    layer_norm_epsilon: float
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    quant_mode: str | None = None
    quant_lm_head: bool = False
    quant_embedding: bool = False
    quant_position_embedding: bool = False
    per_channel: bool = True
    per_token: bool = False
    kv_cache_dtype: str | None = None
    block_size: int = modelopt_layout.BLOCK
    pre_quant_scale: bool = True

    def as_dict(self) -> dict[str, Any]:
        """The settings as a plain dict."""
        return asdict(self)


# Name → (default of transformers' GPT2Config, largest accepted value). The limits are far above any real model; they
# keep a damaged config.json from asking for astronomic amounts of work before the first comparison with the weights.
_SIZES = {
    "vocab_size": (50257, 2**24),
    "n_positions": (1024, 2**24),
    "n_layer": (12, 2**12),
    "n_head": (12, 2**12),
    "n_embd": (768, 2**17),
}

# transformers reads these as synonyms.
_SYNONYMS = {
    "n_positions": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
}

_ACTIVATIONS = {
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",  # the same formula
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

# Name → default.
_SWITCHES = {
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}

_ARCHITECTURES = ("GPT2LMHeadModel", "GPT2Model")

# Settings that change the computation → the one value that the model implements.
_FIXED = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {_reason(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"expected a JSON object in {path}, got a {type(value).__name__}")
    return value


def _read_config(path: Path) -> CheckpointConfig:
    """Validate a config.json."""
    if not _is_file(path):
        raise CheckpointError(f"{str(path.parent)!r} is not a checkpoint: it has no config.json")
    raw = read_json(path)
    _check_architecture(path, raw)

    def integer(name: str, value: object, limit: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise CheckpointError(f"{path}: expected {name} to be an integer from 1 to {limit}, got {_shown(value)}")
        return value

    sizes: dict[str, Any] = {}
    for name, (default, limit) in _SIZES.items():
        synonym = _SYNONYMS.get(name, name)
        if name in raw and synonym in raw and raw[name] != raw[synonym]:
            values = f"{_shown(raw[name])} and {_shown(raw[synonym])}"
            raise CheckpointError(f"{path}: {name} and its synonym {synonym} contradict each other: {values}")
        sizes[name] = integer(name, raw.get(name, raw.get(synonym, default)), limit)
    n_inner = raw.get("n_inner")
    n_inner = 4 * sizes["n_embd"] if n_inner is None else integer("n_inner", n_inner, 2**19)
    if sizes["n_embd"] % sizes["n_head"]:
        raise CheckpointError(f"{path}: n_embd ({sizes['n_embd']}) is not a multiple of n_head ({sizes['n_head']})")

    activation = raw.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        accepted = ", ".join(_ACTIVATIONS)
        raise CheckpointError(f"{path}: expected activation_function to be one of {accepted}, got {_shown(activation)}")
    epsilon = raw.get("layer_norm_epsilon", 1e-5)
    if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)) or not 0 < epsilon < 1:
        raise CheckpointError(
            f"{path}: expected layer_norm_epsilon to be a number between 0 and 1, got {_shown(epsilon)}"
        )
    switches = {name: raw.get(name, default) for name, default in _SWITCHES.items()}
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise CheckpointError(f"{path}: expected {name} to be true or false, got {_shown(value)}")
    return CheckpointConfig(
        **sizes,
        n_inner=n_inner,
        activation_function=_ACTIVATIONS[activation],
        layer_norm_epsilon=float(epsilon),
        eos_token_ids=_ending_ids(path, raw, sizes["vocab_size"]),
        **switches,
    )


def _ending_ids(path: Path, raw: dict[str, Any], vocab_size: int) -> tuple[int, ...]:
    """The eos_token_id of a JSON object: an integer, a list of them, or null. Sorted, and those of the vocabulary."""
    value = raw.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in ids):
        raise CheckpointError(
            f"{path}: expected eos_token_id to be an integer, a list of integers or null, got {_shown(value)}"
        )
    return tuple(sorted({each for each in ids if 0 <= each < vocab_size}))


def _check_architecture(path: Path, raw: dict[str, Any]) -> None:
    """Refuse what is not a GPT-2 language model, or is one with a computation of its own."""
    model_type, architectures = raw.get("model_type"), raw.get("architectures")
    if model_type != "gpt2" and (model_type is not None or not architectures):
        raise CheckpointError(f"{path}: expected model_type 'gpt2', got {_shown(model_type)}")
    if architectures and not (isinstance(architectures, list) and all(a in _ARCHITECTURES for a in architectures)):
        accepted = " or ".join(_ARCHITECTURES)
        raise CheckpointError(f"{path}: expected architectures to be {accepted}, got {_shown(architectures)}")
    for name, implemented in _FIXED.items():
        if raw.get(name, implemented) is not implemented:
            value = _shown(raw[name])
            raise CheckpointError(f"{path}: {name}={value} is not supported, only {name}={_shown(implemented)}")
    if raw.get("pruned_heads"):
        raise CheckpointError(f"{path}: a checkpoint with pruned_heads is not supported")
    quantization = raw.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        if method != "modelopt":
            raise CheckpointError(
                f"{path}: expected the quant_method of quantization_config to be modelopt, got {_shown(method)}"
            )
        if not _is_file(path.parent / DESCRIPTION_FILE):
            raise CheckpointError(f"{path} has a quantization_config, but {DESCRIPTION_FILE} is missing beside it")


def _listed(names: list[str], limit: int = 8) -> str:
    """The first names of what can be hundreds."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _shown(value: object) -> str:
    """A JSON value for a message."""
    try:
        text = json.dumps(value)
    except ValueError:  # an integer beyond Python's limit for printing
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:79] + "…"


# ---------------------------------------------------------------------------------------------------------------------
# The files that hold the weights
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stored:
    """A tensor as its file's header describes it."""

    dtype: str  # in safetensors' notation: "F32"
    shape: tuple[int, ...]


class _WeightFile(Protocol):
    """An open file of weights: `tensors` comes from headers alone, `read` gives one of them, or some of its rows."""

    tensors: dict[str, _Stored]

    def read(self, name: str, rows: slice | EllipsisType = ...) -> np.ndarray: ...


# Safetensors' names of the types that a checkpoint may hold → NumPy's, or ml_dtypes'.
_NUMPY_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "I8": "int8",
    "U8": "uint8",
}


_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1}


class _SafetensorsFile:
    """A memory-mapped .safetensors file.

    The safetensors library validates the file: its header, and that the tensors fill the rest without gap or overlap.
    The values are then taken straight from the mapping, since the library would copy each tensor before its conversion.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            # The library says of a file that may not be read that there is none: it is opened here first.
            with path.open("rb") as file, safe_open(path, framework="numpy"):
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            begin = 8 + int.from_bytes(self._bytes[:8], "little")
            header = json.loads(self._bytes[8:begin])
        except (SafetensorError, OSError, ValueError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
            raise CheckpointError(f"{path} is not a readable safetensors file: {_reason(error)}") from error
        header.pop("__metadata__", None)
        self.tensors = {name: _Stored(entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
        self._offsets = {name: begin + entry["data_offsets"][0] for name, entry in header.items()}

    def read(self, name: str, rows: slice | EllipsisType = ...) -> np.ndarray:
        stored = self.tensors[name]
        dtype = numpy_dtype(_NUMPY_NAMES[stored.dtype])
        count = int(np.prod(stored.shape, dtype=np.int64))
        values = np.frombuffer(self._bytes, dtype, count, self._offsets[name])
        return values.reshape(stored.shape)[rows]


class _TorchFile:
    """An old pytorch_model.bin. Only tensors are unpickled (`weights_only`): code in the file is refused, not run."""

    def __init__(self, path: Path) -> None:
        try:
            import torch
        except ImportError as error:
            hint = "pip install torch==2.13.0"
            raise CheckpointError(f"PyTorch is needed to read {path}, and is not installed: {hint}") from error
        try:
            path.open("rb").close()
            # Only the zip format can be memory-mapped; files of before 2020 are read whole.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of formats that are odd or old: they are read, or refused below
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
            message = f"{path} is not a readable PyTorch file of tensors and nothing else: {_reason(error)}"
            raise CheckpointError(message) from error
        if not isinstance(state, dict):
            raise CheckpointError(f"expected a dict of tensors in {path}, got a {type(state).__name__}")
        notation = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
        self._bfloat16, self._int16 = torch.bfloat16, torch.int16
        self._state, self.tensors = state, {}
        for name, tensor in state.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise CheckpointError(
                    f"expected only named tensors in {path}, got {_shown(str(name))}: {type(tensor).__name__}"
                )
            if tensor.layout != torch.strided or tensor.device.type != "cpu":
                raise CheckpointError(
                    f"{path}: {name} is a tensor without plain values ({tensor.layout}, {tensor.device.type})"
                )
            dtype = notation.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
            self.tensors[name] = _Stored(dtype, tuple(tensor.shape))

    def read(self, name: str, rows: slice | EllipsisType = ...) -> np.ndarray:
        tensor = self._state[name].detach()[rows]
        if tensor.dtype == self._bfloat16:  # NumPy has no bfloat16 of its own: the bits go over as integers
            import ml_dtypes

            bits: np.ndarray = tensor.contiguous().view(self._int16).numpy()
            return bits.view(ml_dtypes.bfloat16)
        values: np.ndarray = tensor.numpy()
        return values


def _shard_names(index: Path) -> list[str]:
    """The shards that a *.index.json names: files beside it, never elsewhere."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: expected weight_map to map tensor names to file names")
    suffix = ".safetensors" if index.name == "model.safetensors.index.json" else ".bin"
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if "/" in shard or "\\" in shard or shard.startswith(".") or not shard.endswith(suffix):
            raise CheckpointError(f"{index}: expected the name of a {suffix} file beside it, got {_shown(shard)}")
    return shards


def _weight_paths(folder: Path) -> list[Path]:
    """The files that hold a folder's weights."""
    for file in WEIGHT_FILES:
        path = folder / file
        if _is_file(path):
            paths = [folder / shard for shard in _shard_names(path)] if file.endswith(".index.json") else [path]
            absent = [p.name for p in paths if not _is_file(p)]
            if absent:
                raise CheckpointError(f"{path} names shards that are missing: {', '.join(absent)}")
            return paths
    raise CheckpointError(f"{str(folder)!r} holds no weights: expected one of {', '.join(WEIGHT_FILES)}")


# ---------------------------------------------------------------------------------------------------------------------
# The checkpoint
# ---------------------------------------------------------------------------------------------------------------------

_PREFIX = "transformer."
# Causal masks, which old versions of transformers saved with the weights.
_BUFFERS = (".attn.bias", ".attn.masked_bias")
# transformers' Conv1D keeps weights as (in, out), nvtripy's Linear as (out, in).
_CONV1D = (".attn.c_attn.weight", ".attn.c_proj.weight", ".mlp.c_fc.weight", ".mlp.c_proj.weight")


def parameter_shapes(config: CheckpointConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model before quantization, in `Checkpoint.parameters`' order; linear weights (out, in)."""
    embd, inner = config.n_embd, config.n_inner
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (config.vocab_size, embd),
        "wpe.weight": (config.n_positions, embd),
    }
    for layer in range(config.n_layer):
        block = f"h.{layer}"
        shapes[f"{block}.ln_1.weight"] = shapes[f"{block}.ln_1.bias"] = (embd,)
        for linear, (size_out, size_in) in {
            "attn.c_attn": (3 * embd, embd),
            "attn.c_proj": (embd, embd),
            "ln_2": (embd, 0),
            "mlp.c_fc": (inner, embd),
            "mlp.c_proj": (embd, inner),
        }.items():
            shapes[f"{block}.{linear}.weight"] = (size_out, size_in) if size_in else (size_out,)
            shapes[f"{block}.{linear}.bias"] = (size_out,)
    shapes["ln_f.weight"] = shapes["ln_f.bias"] = (embd,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, embd)
    return shapes


class Checkpoint:
    """A validated GPT-2 checkpoint in a local folder. The files stay open (memory-mapped) as long as it lives.

    Attributes:
        path: the folder.
        config: the settings of its config.json.
        weight_files: the files that hold its weights.

    Raises:
        CheckpointError: at construction, from config.json and the headers of the weight files alone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = _read_config(path / "config.json")
        if _is_file(path / GENERATION_FILE):
            generation = path / GENERATION_FILE
            ends = _ending_ids(generation, read_json(generation), self.config.vocab_size)
            self.config = replace(self.config, eos_token_ids=ends)
        self.weight_files = _weight_paths(path)
        self._sources: dict[str, tuple[_WeightFile, str]] = {}  # tensor → its file, and its name there
        for file_path in self.weight_files:
            file: _WeightFile = (
                _SafetensorsFile(file_path) if file_path.suffix == ".safetensors" else _TorchFile(file_path)
            )
            for stored_name in file.tensors:
                name = stored_name.removeprefix(_PREFIX)
                if name.startswith("h.") and name.endswith(_BUFFERS):
                    continue
                if name in self._sources and self._sources[name][1] != stored_name:
                    raise CheckpointError(f"{path}: {name} is stored twice, with and without {_PREFIX!r}")
                self._sources[name] = file, stored_name  # of a tensor in two shards the last one, as in transformers
        if self.config.tie_word_embeddings and "wte.weight" not in self._sources and "lm_head.weight" in self._sources:
            self._sources["wte.weight"] = self._sources.pop("lm_head.weight")  # safetensors' save_model keeps either
        headers = {name: file.tensors[stored_name] for name, (file, stored_name) in self._sources.items()}
        shapes = parameter_shapes(self.config)
        if "lm_head.weight" in headers:  # a tied head may be stored all the same
            shapes["lm_head.weight"] = shapes["wte.weight"]
        description = path / DESCRIPTION_FILE
        self._has_conv1d = not _is_file(description)
        if self._has_conv1d:
            expected = {
                name: Spec(FLOATS, shape[::-1] if name.endswith(_CONV1D) else shape) for name, shape in shapes.items()
            }
        else:
            try:
                how = modelopt_layout.read_description(read_json(description))
                fields = modelopt_layout.config_fields(how, self.config.tie_word_embeddings, headers)
                self.config = replace(self.config, **fields)
                expected = modelopt_layout.stored_tensors(self.config, shapes)
            except ValueError as error:
                raise CheckpointError(f"{description}: {error}") from None
        self._check_tensors(expected, headers)

    def _check_tensors(self, expected: dict[str, Spec], found: dict[str, _Stored]) -> None:
        """Compare the stored tensors with those that the JSON files imply; name all differences at once."""
        shapes, dtypes = [], []
        for name in expected.keys() & found.keys():
            spec, stored, stored_name = expected[name], found[name], self._sources[name][1]
            if not spec.fits(stored.shape):
                shapes.append(f"{stored_name} (expected {spec.shape}, got {stored.shape})")
            if stored.dtype not in spec.dtypes:
                dtypes.append(f"{stored_name} (expected {', '.join(spec.dtypes)}, got {stored.dtype})")
        faults = {
            "missing": [name for name in expected if name not in found],
            "unexpected": [self._sources[name][1] for name in found if name not in expected],
            "of a wrong shape": sorted(shapes),
            "of a wrong dtype": sorted(dtypes),
        }
        all_found = "; ".join(f"{fault}: {_listed(names)}" for fault, names in faults.items() if names)
        if all_found:
            raise CheckpointError(
                f"the tensors in {str(self.path)!r} are not those that its config.json implies: {all_found}"
            )

    def parameters(self, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
        """Yield every parameter by name, in the order of `parameter_shapes`, reading one tensor at a time.

        Args:
            dtype: "float32", "float16" or "bfloat16" (arrays of `ml_dtypes.bfloat16`), for all parameters but those of
                the LayerNorms, which always come as float32, and what has scales, which comes as float32 where
                `needs_float32_scales`.

        Yields:
            (name, array): C-contiguous; linear weights are (out, in); "lm_head.weight" (vocab, n_embd) only if untied
            or quantized, and if it is tied and `config.quant_embedding`, instead of "wte.weight".

            Of a quantized layer, the values that its integers stand for, which quantizing by the scales that follow
            gives back exactly, and "weight_scale", "input_scale", "pre_quant_scale" as the mode has them, where one
            element stands for the whole tensor with shape (). In int4-weight-only the weight is (in, out) and its
            scales (in / block_size, out). Of a quantized cache, "attn.k_scale" and "attn.v_scale" of each layer, of
            shape (). No scale is zero.

        Raises:
            CheckpointError: a number is not finite, or not in `dtype` (the tensor is named), a scale is negative, or a
                head is stored that differs from the embedding although config.json says that they are tied.
            ValueError: another `dtype`.
        """
        if dtype not in PARAMETER_DTYPES:
            raise ValueError(f"expected dtype to be one of {', '.join(PARAMETER_DTYPES)}, got {dtype!r}")
        self._check_tied_head()
        target = numpy_dtype(dtype)
        scaled_target = numpy_dtype("float32") if self.needs_float32_scales(dtype) else target
        shapes = parameter_shapes(self.config)
        if self.config.quant_lm_head and not self.config.quant_embedding:
            shapes["lm_head.weight"] = shapes["wte.weight"]
        for name, shape in shapes.items():
            if modelopt_layout.is_quantized(self.config, name):
                yield from self._quantized_layer(name.removesuffix(".weight"), shape, scaled_target)
                continue
            transpose = self._has_conv1d and name.endswith(_CONV1D)
            layer_norm = ".ln_" in name or name.startswith("ln_f.")
            yield name, self._convert(name, numpy_dtype("float32") if layer_norm else target, transpose)
        if self.config.kv_cache_dtype is not None:
            for layer in range(self.config.n_layer):
                for which in ("k", "v"):
                    scale = self._read_scale(modelopt_layout.cache_scale(layer, which), scaled_target)
                    yield (
                        f"h.{layer}.attn.{which}_scale",
                        modelopt_layout.rounding_scale(scale, self.config.kv_cache_dtype == "fp8"),
                    )

    def needs_float32_scales(self, dtype: str) -> bool:
        """Whether a scale is below the normal numbers of `dtype`, which would round it coarsely, or to zero.

        Those of weights that are zero do not count: any other scale does as well.
        """
        import ml_dtypes

        smallest = float(ml_dtypes.finfo(numpy_dtype(dtype)).smallest_normal)
        if dtype == "float32":
            return False
        for name in self._sources:
            if not name.endswith(modelopt_layout.SCALES):
                continue
            scales = self._read(name)
            is_small = (scales > 0) & (scales < smallest)
            if not is_small.any():
                continue
            layer, _, kind = name.rpartition(".")
            if kind != "weight_scale":
                return True
            numbers = modelopt_layout.unpacked(self._read(f"{layer}.weight"), len(np.atleast_1d(scales)))
            if (modelopt_layout.by_scale(numbers != 0, scales).any(axis=-1) & is_small).any():
                return True
        return False

    def _quantized_layer(
        self, layer: str, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """The parameters of one linear layer of `shape` (out, in), without its bias, or of an embedding."""
        name = "lm_head" if layer == "wte" and self.config.tie_word_embeddings else layer
        numbers = modelopt_layout.unpacked(self._read(f"{layer}.weight"), shape[0])
        scales = self._read_scale(f"{layer}.weight_scale", dtype)
        transpose = scales.ndim == 2
        if transpose:
            scales = scales[: shape[0]]
        elif scales.size == 1 and shape[0] > 1:
            scales = scales.reshape(())
        try:
            weight = scaled(f"{name}.weight", numbers, scales, dtype, transpose)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from None
        if transpose:
            scales = np.ascontiguousarray(scales.T)
        yield f"{name}.weight", weight
        # Of zeros, whose scale is zero or nearly so, any scale gives zeros back.
        yield f"{name}.weight_scale", np.where(scales == 0, np.ones_like(scales), scales)
        for suffix in ("input_scale", "pre_quant_scale"):
            if f"{name}.{suffix}" in self._sources:
                scale = self._read_scale(f"{name}.{suffix}", dtype)
                if suffix == "input_scale":
                    scale = modelopt_layout.rounding_scale(scale, self.config.quant_mode == "fp8")
                yield f"{name}.{suffix}", scale

    def stored_bytes(self) -> dict[str, int]:
        """Bytes of every stored tensor, scales among them, by name without the prefix "transformer."."""
        headers = {name: file.tensors[stored_name] for name, (file, stored_name) in self._sources.items()}
        return {name: math.prod(header.shape) * _ITEM_BYTES[header.dtype] for name, header in headers.items()}

    def _read(self, name: str) -> np.ndarray:
        """A stored tensor, whole."""
        file, stored_name = self._sources[name]
        return file.read(stored_name)

    def _convert(self, name: str, dtype: np.dtype[Any], transpose: bool = False) -> np.ndarray:
        """A stored tensor in `dtype`; of a matrix its transpose, if that is asked for."""
        try:
            return convert(name, self._read(name), dtype, transpose)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from None

    def _read_scale(self, name: str, dtype: np.dtype[Any]) -> np.ndarray:
        try:
            modelopt_layout.check_scales(name, self._read(name))
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from None
        return self._convert(name, dtype)

    def _check_tied_head(self) -> None:
        """Refuse a stored head that is not the embedding: transformers would not tie it, so its logits would differ."""
        if not self.config.tie_word_embeddings or self.config.quant_lm_head != self.config.quant_embedding:
            return
        step = max(1, 2**22 // self.config.n_embd)  # some 16 MB at a time
        for suffix in ("weight", "weight_scale"):
            if f"lm_head.{suffix}" not in self._sources:
                continue
            head, head_name = self._sources[f"lm_head.{suffix}"]
            embedding, embedding_name = self._sources[f"wte.{suffix}"]
            shape = head.tensors[head_name].shape
            parts = [slice(start, start + step) for start in range(0, shape[0], step)] if shape else [...]
            if not all(_are_equal(head.read(head_name, p), embedding.read(embedding_name, p)) for p in parts):
                raise CheckpointError(
                    f"{self.path / 'config.json'} ties lm_head.{suffix} to wte.{suffix}, but the stored values differ: "
                    "expected equal values or tie_word_embeddings=false"
                )

    def fingerprint(self) -> str:
        """A hexadecimal hash that identifies the configuration and the weights, to name what is derived from them.

        It covers the validated config but for the tokens that end a text, every tensor's name, dtype and shape, and
        each weight file's content: in full up to 64 MB (so a copied small checkpoint keeps its fingerprint); of a
        larger file its size, its time of modification in nanoseconds, and 256 evenly spaced samples of 64 KiB, among
        them its start and its end.
        """
        settings = {**self.config.as_dict(), "eos_token_ids": None}
        digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
        for name in sorted(self._sources):
            file, stored_name = self._sources[name]
            digest.update(repr((name, stored_name, file.tensors[stored_name])).encode())
        for path in self.weight_files:
            try:
                for piece in _content_pieces(path):
                    digest.update(piece)
            except OSError as error:
                raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        return digest.hexdigest()


def _are_equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two tensors have the same values; NaN counts as one, for whoever reads the values to refuse."""
    return np.array_equal(a, b) or np.array_equal(a, b, equal_nan=True)


_FULLY_HASHED = 64 * 2**20
_SAMPLES, _SAMPLE_BYTES = 256, 2**16


def _content_pieces(path: Path) -> Iterable[bytes]:
    """What of a file goes into the fingerprint."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if status.st_size <= _FULLY_HASHED:
            yield repr((path.name, status.st_size)).encode()
            while piece := file.read(2**20):
                yield piece
        else:
            yield repr((path.name, status.st_size, status.st_mtime_ns)).encode()
            last = status.st_size - _SAMPLE_BYTES
            for sample in range(_SAMPLES):
                file.seek(last * sample // (_SAMPLES - 1))
                yield file.read(_SAMPLE_BYTES)

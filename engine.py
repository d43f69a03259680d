"""The compiled model: built from a checkpoint, or opened from where an earlier run saved it."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import nvtripy as tp

import model as model_module
from engine_cache import EngineError, EngineFolder
from loading.fingerprint import READERS
from model import GPT, GPTConfig, Linear
from nvtripy_portable import engine_file
from nvtripy_portable.decoder import Decoder, Rows
from nvtripy_portable.unchanging import never_changes
from parallelism.mapping import Mapping
from weight_loader import Checkpoint, CheckpointError


@contextlib.contextmanager
def stderr_kept() -> Iterator[None]:
    """nvtripy leaves a block-buffered copy of standard error in ``sys.stderr`` whenever it compiles: undone here."""
    stderr = sys.stderr
    try:
        yield
    finally:
        sys.stderr = stderr


@dataclass(frozen=True)
class AdapterRoom:
    """Room for adapters (LoRA) and virtual tokens (prompt tuning) in an engine.

    Attributes:
        count: How many adapters.
        ranks: The largest rank of each, for each of ``model.ADAPTED``; 0: adapters leave that layer as it is.
        prompt_rows: How many virtual tokens.
    """

    count: int = 0
    ranks: tuple[int, ...] = (0,) * len(model_module.ADAPTED)
    prompt_rows: int = 0


class HasRanks(Protocol):
    """An adapter."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """For each of ``model.ADAPTED``."""


def room_of(adapters: Sequence[HasRanks], prompt_rows: int = 0) -> AdapterRoom | None:
    """Room for these adapters and so many virtual tokens, and no more; None where there are none."""
    if not adapters:
        return AdapterRoom(prompt_rows=prompt_rows) if prompt_rows else None
    ranks = tuple(max(ranks) for ranks in zip(*(each.ranks for each in adapters), strict=True))
    return AdapterRoom(len(adapters), ranks, prompt_rows)


class Engine:
    """A compiled GPT and the key-value cache of the sequences that it is continuing.

    Args:
        executable: What :func:`compile_model` returned.
        config: The model's configuration.
        batch: How many sequences it was compiled for.

    Raises:
        EngineError: the environment asks the portable runtime for what it does not have.
    """

    @stderr_kept()
    def __init__(self, executable: tp.Executable, config: GPTConfig, batch: int) -> None:
        self.batch, self.context = batch, config.n_positions
        self.room = AdapterRoom(config.adapters, config.adapter_ranks, config.prompt_rows)
        self.executable = executable
        try:
            decoder = Decoder.of(executable)
        except ValueError as error:
            raise EngineError(str(error)) from None
        self._decoder = decoder
        self._rows = None if decoder is None else Rows(decoder, batch)
        if self._rows is None:
            self._cache = tp.zeros(config.cache_shape(batch), dtype=config.cache_dtype).eval()
            self._slots = np.zeros(batch, np.int32)
            self._tables = [np.zeros(shape, np.float32) for shape in config.adapter_shapes]
            self._tables_there: list[tp.Tensor] = []
            self._prompts = np.zeros((config.prompt_rows, config.n_embd), np.float32)
            self._prompts_there: dict[str, tp.Tensor] = {}
            self._dtype = config.tripy_dtype

    @property
    def decoder(self) -> Decoder | None:
        """What takes the engine's steps; None where NVIDIA's runtime does."""
        return self._decoder

    def paged(self, page_tokens: int, pages: int) -> Decoder | None:
        """A decoder of the same model with a pool of its own, for any number of sequences; None where NVIDIA's runtime
        runs the model, whose sequences are ``batch`` rows."""
        return None if self._decoder is None else Decoder.of(self.executable, page_tokens, pages)

    def set_adapter(self, slot: int, matrices: Sequence[np.ndarray | None] | None) -> None:
        """Puts an adapter into a slot, from 1 on, as ``Decoder.set_adapter``."""
        if self._decoder is not None:
            self._decoder.set_adapter(slot, matrices)
            return
        Decoder.put_adapter(self._tables, slot, matrices)
        self._tables_there = []

    def set_prompts(self, rows: np.ndarray) -> None:
        """Gives the embeddings of virtual tokens, as ``Decoder.set_prompts``."""
        if self._decoder is not None:
            self._decoder.set_prompts(rows)
            return
        Decoder.put_prompts(self._prompts, rows)
        self._prompts_there = {}

    def choose(self, slots: Sequence[int]) -> None:
        """Which adapter each sequence of the batch has from the next step on; 0: none."""
        if self._rows is not None:
            self._rows.choose(slots)
        else:
            self._slots[:] = slots

    def step(self, idx: np.ndarray, position: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Appends tokens to the sequences.

        A new sequence begins at position 0, in the old one's place. One token at a later position is one that the model
        has generated, any other tokens are a prompt's.

        Args:
            idx: Token ids, (B, T) int32.
            position: Tokens that each sequence has already, (B,) int32.
            last: For which token of each row logits are wanted, (B,) int32. What comes after it is padding; -1 is for a
                row that has no token in this step, and whose logits nobody looks at.

        Returns:
            Float32 logits, (B, V).
        """
        if self._rows is not None:
            return self._rows.step(idx, position, last)
        inputs = [_to_device(idx), _to_device(position), self._cache, _to_device(last)]
        if self._tables:
            if not self._tables_there:
                self._tables_there = [tp.cast(_to_device(each), self._dtype).eval() for each in self._tables]
            inputs += [_to_device(self._slots), self._tables_there]
        if len(self._prompts) and not self._prompts_there:
            self._prompts_there = {"prompts": tp.cast(_to_device(self._prompts), self._dtype).eval()}
        logits, self._cache = self.executable(*inputs, **self._prompts_there)
        return _to_host(logits)


def _to_device(array: np.ndarray) -> tp.Tensor:
    return tp.copy(tp.Tensor(np.ascontiguousarray(array)), tp.device("gpu"))


def _to_host(tensor: tp.Tensor) -> np.ndarray:
    try:
        return np.from_dlpack(tensor)
    except (BufferError, RuntimeError, TypeError):
        return np.from_dlpack(tp.copy(tensor, tp.device("cpu")))


def config_of(checkpoint: Checkpoint, dtype: str, mapping: Mapping | None = None) -> GPTConfig:
    """The model's configuration for a checkpoint, computed in ``dtype``; of one rank, where several share the model.

    Raises:
        CheckpointError: they cannot share it so.
    """
    found, shared = checkpoint.config, dict[str, Any]()
    if mapping is not None and mapping.tp_size > 1:
        try:
            mapping.check(found)
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.path}: {error}") from None
        dimension = mapping.embedding_sharding_dim
        if found.tie_word_embeddings and found.quant_embedding:  # its rows are the head's, which ranks share
            if dimension == 1:
                raise CheckpointError(
                    f"{checkpoint.path}: expected embedding_sharding_dim 0, as the quantized embedding is the head, "
                    "but got 1"
                )
            dimension = 0
        found = mapping.local(found)
        shared = {"tp_size": mapping.tp_size, "tp_rank": mapping.tp_rank, "embedding_sharding_dim": dimension}
    names = GPTConfig.__dataclass_fields__
    return GPTConfig(
        **{name: value for name, value in asdict(found).items() if name in names},
        dtype=dtype,
        float32_scales=checkpoint.needs_float32_scales(dtype),
        **shared,
    )


@stderr_kept()
def load_model(checkpoint: Checkpoint, config: GPTConfig) -> GPT:
    """The model with the checkpoint's weights, or a rank's part of it with its part of them.

    Raises:
        CheckpointError: the weights are not those of ``config``.
    """
    gpt = GPT(config)
    wanted = {name: parameter.dtype for name, parameter in gpt.state_dict().items()}
    layers = dict(linear_layers(gpt))
    state = {}
    parameters = checkpoint.parameters(config.dtype)
    if config.tp_size > 1:
        mapping = Mapping(config.tp_size, 1, config.tp_rank, config.embedding_sharding_dim)
        parameters = checkpoint.rank_parameters(config.dtype, mapping)
    for name, array in parameters:
        array = even_columns(array, layers.get(name.rpartition(".")[0]))
        # NumPy has no bfloat16 to hand over: those numbers go as float32, which holds them, and are cast in the graph.
        array = array.astype(np.float32) if config.dtype == "bfloat16" else array
        tensor = tp.Tensor(never_changes(array) if array.flags.owndata else array)  # it is made for the model alone
        if tensor.dtype != wanted[name]:
            tensor = tp.cast(tensor, wanted[name])
            if name.endswith("_scale"):  # which nvtripy takes as a constant in the CPU's memory only
                tensor = tp.copy(tensor, tp.device("cpu"))
        state[name] = tensor
    gpt.load_state_dict(state)
    return gpt


def linear_layers(module: tp.Module, prefix: str = "") -> Iterator[tuple[str, Linear]]:
    """The model's own linear layers, by the names of their parameters."""
    for name, child in module.named_children():
        if isinstance(child, Linear):
            yield f"{prefix}{name}", child
        else:
            yield from linear_layers(child, f"{prefix}{name}.")


def even_columns(array: np.ndarray, layer: Linear | None) -> np.ndarray:
    """A weight or scale with the column of ones that its layer asks for after an odd number of them."""
    if layer is None or not layer.is_padded or array.ndim != 2 or array.shape[1] != layer.out_features:
        return array
    return np.pad(array, ((0, 0), (0, 1)), constant_values=1)


@stderr_kept()
def compile_model(gpt: GPT, batch: int) -> tp.Executable:
    """Compiles the cached forward for ``batch`` sequences and any number of tokens a call, up to the context."""
    return tp.compile(forward_of(gpt), args=_inputs(gpt.config, batch), kwargs=_prompts(gpt.config))


def forward_of(gpt: GPT) -> Callable[..., Any]:
    """A model's forward, to be compiled: nvtripy 0.1.7 keeps what it has compiled for good, as the key of a cache of
    signatures. This does not keep the model with it, which has to be there while it is compiled."""
    module = weakref.ref(gpt)

    def forward(*args: Any, **kwargs: Any) -> Any:
        alive = module()
        assert alive is not None
        return alive(*args, **kwargs)

    forward.__signature__ = inspect.signature(gpt.forward)  # type: ignore[attr-defined]
    return forward


def _prompts(config: GPTConfig) -> dict[str, tp.InputInfo]:
    """The embeddings of virtual tokens, where there are any."""
    if not config.prompt_rows:
        return {}
    return {"prompts": tp.InputInfo((config.prompt_rows, config.n_embd), dtype=config.tripy_dtype)}


def _inputs(config: GPTConfig, batch: int) -> list[tp.InputInfo | list[tp.InputInfo]]:
    tokens = (1, 1, config.n_positions)  # decoding, one token at a time, is what matters most
    inputs = [
        tp.InputInfo((batch, tokens), dtype=tp.int32),
        tp.InputInfo((batch,), dtype=tp.int32),
        tp.InputInfo(config.cache_shape(batch), dtype=config.cache_dtype),
        tp.InputInfo((batch,), dtype=tp.int32),
    ]
    if not config.adapter_shapes:
        return inputs
    tables = [tp.InputInfo(shape, dtype=config.tripy_dtype) for shape in config.adapter_shapes]
    return [*inputs, tp.InputInfo((batch,), dtype=tp.int32), tables]


def open_engine(
    checkpoint: Checkpoint,
    dtype: str,
    batch: int,
    folder: EngineFolder | Path | None = None,
    report: Callable[[str], None] = lambda message: None,
    room: AdapterRoom | None = None,
    mapping: Mapping | None = None,
) -> Engine:
    """The engine for a checkpoint: opened from ``folder`` where a current one is saved there, else compiled, and given
    to the folder to be saved.

    An engine is current if it was made from the same weights, for the same type and batch, by the same code and the
    same nvtripy.

    Args:
        mapping: Which rank this is, where several share the model.

    Raises:
        EngineError: ``folder`` cannot be read or written, though it has to, or the environment asks the portable
            runtime for what it does not have.
        CheckpointError: the checkpoint's weights cannot be loaded.
    """
    config = config_of(checkpoint, dtype, mapping)
    if room is not None:
        config = replace(config, adapters=room.count, adapter_ranks=room.ranks, prompt_rows=room.prompt_rows)
    if folder is None:
        return Engine(compile_model(load_model(checkpoint, config), batch), config, batch)
    engines = EngineFolder(folder) if isinstance(folder, Path) else folder
    engines.check()
    path = engines.file(
        checkpoint.path,
        f"{dtype}-batch{batch}{_described(room)}{'' if config.tp_size == 1 else f'-rank{config.tp_rank}'}",
        _key(checkpoint, config, batch),
    )
    if engines.has(path):
        try:
            executable = _load(path, config, batch)
        except Exception as error:
            # Any damage ends here, whatever nvtripy or the runtime make of it: the engine can always be built again.
            # nvtripy puts the source line before what it says of it.
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            report(f"{path} cannot be used ({reason}): building it again")
        else:
            engine = Engine(executable, config, batch)
            engines.used(path)
            report(f"opened {path}")
            return engine
    executable = compile_model(load_model(checkpoint, config), batch)
    engines.save(executable, path, report)
    return Engine(executable, config, batch)


def _described(room: AdapterRoom | None) -> str:
    counts = {"adapters": room.count, "prompts": room.prompt_rows} if room is not None else {}
    return "".join(f"-{name}{count}" for name, count in counts.items() if count)


def _load(path: Path, config: GPTConfig, batch: int) -> tp.Executable:
    """The executable in a file.

    Raises:
        Exception: of any kind, if the file holds anything else, or an executable for other inputs.
    """
    executable = engine_file.load(path)
    wanted = [info for each in _inputs(config, batch) for info in (each if isinstance(each, list) else [each])]
    wanted += _prompts(config).values()
    if not isinstance(executable, tp.Executable) or list(executable.input_infos.values()) != wanted:
        raise ValueError("it holds something else")
    return executable


def _key(checkpoint: Checkpoint, config: GPTConfig, batch: int) -> str:
    """Identifies everything that an engine is made from, but the runtime, which checks its own files itself."""
    parts = [checkpoint.fingerprint(), repr(config), str(batch), tp.__version__]
    for source in (str(model_module.__file__), __file__, *map(str, READERS)):
        parts.append(hashlib.sha256(Path(source).read_bytes()).hexdigest())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

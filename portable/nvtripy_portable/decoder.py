"""A compiled model that continues any mix of sequences, called without nvtripy in between.

The compiled function is ``(idx, position, cache, last) -> (logits, cache)``, for as many sequences of one length as it
was compiled for; where sequences choose among adapters (LoRA), ``slot`` and the adapters' tables come after these, and
``prompts``, the rows of ids beyond the vocabulary, where there are such ids (prompt tuning). What
its graph says of attention, of positions and of the rows whose logits are wanted holds for each token; so a step may as
well take whatever tokens there are: pieces of prompts and single generated tokens of many sequences, packed without
padding. Their keys and values lie in pages of one pool (:mod:`pages`).

A sequence's logits do not depend on what else is computed with it, on how its prompt was cut into pieces, on where its
pages lie, or on the number of threads, to the last bit. A token's role decides how it is computed: of a prompt, or
generated. A generated token that is computed again keeps its role.

``nvtripy.Executable.__call__`` takes 20 microseconds to check its arguments and make tensors of its results while its
code and data are in the processor's caches, and 300 after a step that read a model's weights through them: a sixth of a
token of GPT-2 in int4. Here that is left out.

Example::

    decoder = Decoder.of(executable)
    table = decoder.pool.take(1)
    logits = decoder.step([Piece(prompt, 0, table)])
    logits = decoder.step([Piece([token], len(prompt), table, generated=True)])
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nvtripy_portable import interpreter
from nvtripy_portable.cpu.executor import Executor
from nvtripy_portable.cpu.versions import raw
from nvtripy_portable.executable import Executable
from nvtripy_portable.graph import DTYPES, Graph, TensorType, Value
from nvtripy_portable.interpreter import ExecutionError
from nvtripy_portable.pages import PagePool
from nvtripy_portable.plan import Plan
from nvtripy_portable.plugins import PluginError

if TYPE_CHECKING:
    import nvtripy as tp

#: Tokens in a page: as many keys as meet a block of a prompt's queries together, which then need not be gathered.
PAGE_TOKENS = 64

#: A prompt's tokens that are computed together where tokens see a window only: its pages are given back meanwhile.
PROMPT_TOKENS = 1024

GENERATED, PROMPT = 0, 1  # a segment's role

# Runs a packed step, (tokens, segments, tables, rows, memory, page_tokens, adapters, empty, logits): fills the logits.
_Step = Callable[
    [np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, int, list[np.ndarray], np.ndarray, np.ndarray], None
]


@dataclass
class Piece:
    """Tokens of one sequence that stand one behind the other.

    Args:
        tokens: Their ids, any number.
        position: How many tokens the sequence has before them.
        pages: The sequence's table: the pages that hold its tokens, these included. Where tokens see a window only, any
            number stands for a page that none of these tokens sees.
        generated: Whether the model made them; else they are a prompt's.
        rows: For which of the tokens logits are wanted, counted from the piece's first; None for the last one, if there
            is any.
        slot: Which of the adapters the sequence has, from 1 on; 0: none.
    """

    tokens: Sequence[int] | np.ndarray
    position: int
    pages: Sequence[int] | np.ndarray
    generated: bool = False
    rows: Sequence[int] | None = None
    slot: int = 0

    def wanted(self) -> Sequence[int]:
        """The tokens whose logits are wanted."""
        return ([len(self.tokens) - 1] if len(self.tokens) else []) if self.rows is None else self.rows


class Decoder:
    """A model and the pool of pages of the sequences that it continues. Made by :meth:`of`.

    Attributes:
        pool: Hands out the pages.
        page_tokens: How many tokens a page holds.
        context: How many tokens a sequence can have.
        vocabulary: How many logits a token has.
        window: How many tokens one sees at most, itself included; None where it sees all.
        slots: How many adapters there is room for; 0 where the model has none.
        prompt_rows: How many ids there are beyond the vocabulary, whose embeddings :meth:`set_prompts` gives.
    """

    def __init__(self, step: _Step, roles: _Roles, page_tokens: int, pages: int | None) -> None:
        type = roles.cache.type
        layers, two, batch, heads, context, size = _sizes(type)
        if not 1 <= page_tokens <= context:
            page_tokens = context
        count = batch * -(-context // page_tokens) if pages is None else pages
        self.context, self.page_tokens, self.vocabulary = context, page_tokens, roles.vocabulary
        self.window = roles.window
        self.pool = PagePool(count)
        self._step = step
        # What slot 0 has is none, and stays so.
        tables = [value.type for value in roles.tables]
        self._adapters = [np.zeros(_sizes(each), DTYPES[each.dtype]) for each in tables]
        self.slots = len(self._adapters[0]) - 1 if tables else 0
        prompts = [] if roles.prompts is None else [roles.prompts.type]
        self._prompts = [np.zeros(_sizes(each), DTYPES[each.dtype]) for each in prompts]
        self.prompt_rows = len(self._prompts[0]) if prompts else 0
        self._bytes = [raw(each) for each in (*self._prompts, *self._adapters)]
        self._empty = np.ones(self.slots + 1, np.uint8)
        # Memory of pages that nobody has used is not there yet: the system gives it when it is written.
        self._memory = raw(np.zeros((count, layers, two, heads, page_tokens, size), DTYPES[type.dtype]))

    @staticmethod
    def of(executable: tp.Executable, page_tokens: int = PAGE_TOKENS, pages: int | None = None) -> Decoder | None:
        """The decoder of a compiled function, or None where there can be none: NVIDIA's runtime runs it, or it is
        anything else than tokens, positions, one cache and rows to float32 logits and the cache's next version.

        Args:
            page_tokens: How many tokens a page holds; at most the context.
            pages: How many there are; None for as many as the sequences can fill that the function was compiled for.

        Raises:
            ValueError: the environment asks for an instruction set or a number of threads that cannot be.
        """
        # nvtripy has no public name for what its runtime gave it.
        compiled = getattr(getattr(executable, "_executable", None), "portable", None)
        if not isinstance(compiled, Executable):
            return None
        roles = _Roles.of(compiled.graph)
        if roles is None:
            return None
        try:
            runner = compiled.runner()
        except ExecutionError as error:
            raise ValueError(str(error)) from None
        if isinstance(runner, Executor) and not runner.lowered.takes_any_rows:
            runner = Plan(compiled.graph)  # sequence by sequence
        if isinstance(runner, Executor):
            if len(runner.lowered.caches) != 1 or runner.lowered.floats:
                return None
            return Decoder(runner.step, roles, page_tokens, pages)
        return Decoder(_Interpreted(runner, compiled.graph, roles).step, roles, page_tokens, pages)

    def copy(self, source: int, target: int) -> None:
        """Makes the keys and values in page ``target`` those of ``source``, for a sequence that goes on from another's
        last tokens."""
        self._memory[target] = self._memory[source]

    def set_prompts(self, rows: np.ndarray) -> None:
        """Gives the embeddings of the ids from ``vocabulary`` on, for the steps that come.

        Args:
            rows: (at most ``prompt_rows``, width); those of the other ids are zeros.

        Raises:
            ValueError: they do not fit.
        """
        self.put_prompts(self._prompts[0] if self._prompts else np.zeros((0, 0), np.float32), rows)

    @staticmethod
    def put_prompts(table: np.ndarray, rows: np.ndarray) -> None:
        """Writes embeddings into a model's table (prompt_rows, width), as :meth:`set_prompts` does."""
        if rows.ndim != 2 or rows.shape[1] != table.shape[1] or len(rows) > len(table):
            raise ValueError(f"expected at most {table.shape} rows of prompts but got {rows.shape}")
        table[:] = 0
        table[: len(rows)] = rows

    def set_adapter(self, slot: int, matrices: Sequence[np.ndarray | None] | None) -> None:
        """Puts an adapter into a slot, for the steps that come.

        Args:
            slot: From 1 to ``slots``.
            matrices: For each of the model's tables (layers, rank, width), in their order, or None for zeros; a smaller
                rank is filled up with zeros. None: the slot is empty again, which is as if there were no adapter.

        Raises:
            ValueError: there is no such slot, or the matrices do not fit the tables.
        """
        self.put_adapter(self._adapters, slot, matrices)
        self._empty[slot] = matrices is None

    @staticmethod
    def put_adapter(tables: Sequence[np.ndarray], slot: int, matrices: Sequence[np.ndarray | None] | None) -> None:
        """Writes an adapter into its slot of a model's tables (slots, layers, rank, width), as :meth:`set_adapter`
        does."""
        slots = len(tables[0]) - 1 if tables else 0
        if not 1 <= slot <= slots:
            raise ValueError(f"expected a slot from 1 to {slots} but got {slot}")
        given = [None] * len(tables) if matrices is None else list(matrices)
        if len(given) != len(tables):
            raise ValueError(f"expected {len(tables)} matrices but got {len(given)}")
        for table, matrix in zip(tables, given, strict=True):
            layers, rank, width = table.shape[1:]
            if matrix is not None and (matrix.shape[::2] != (layers, width) or matrix.shape[1] > rank):
                raise ValueError(f"expected a matrix of at most {table.shape[1:]} but got {matrix.shape}")
        for table, matrix in zip(tables, given, strict=True):
            table[slot] = 0
            if matrix is not None:
                table[slot, :, : matrix.shape[1]] = matrix

    def step(self, pieces: Sequence[Piece]) -> np.ndarray:
        """The logits that the pieces ask for, float32 (rows, vocabulary), in the order of the pieces. Their keys and
        values are in their pages from then on.

        Raises:
            ValueError: a token id, a position or a row that is not in its table, or pages that do not hold the tokens.
                The pages are as before then.
            PluginError: a plug-in in the model failed. What these tokens' places in the pages hold is unknown then.
        """
        order = sorted(range(len(pieces)), key=lambda i: not pieces[i].generated)
        widest = max((len(piece.pages) for piece in pieces), default=0)
        segments = np.empty((len(pieces), 4), np.int32)
        tables = np.full((len(pieces), widest), -1, np.int32)
        starts, tokens, start = {}, [], 0
        for row, number in enumerate(order):
            piece = pieces[number]
            segments[row] = len(piece.tokens), piece.position, GENERATED if piece.generated else PROMPT, piece.slot
            tables[row, : len(piece.pages)] = piece.pages
            tokens.append(np.asarray(piece.tokens, np.int32))
            starts[number], start = start, start + len(piece.tokens)
        rows = []
        for number, piece in enumerate(pieces):
            for row in piece.wanted():
                if not 0 <= row < len(piece.tokens):
                    raise ValueError(f"expected rows of a piece to be 0 to {len(piece.tokens) - 1} but got {row}")
                rows.append(starts[number] + row)
        packed = np.concatenate(tokens) if tokens else np.empty(0, np.int32)
        return self.run(packed, segments, tables, np.array(rows, np.int32))

    def run(self, tokens: np.ndarray, segments: np.ndarray, tables: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """:meth:`step`, of pieces that are packed already. All arrays are int32 and contiguous.

        Args:
            tokens: Ids of all pieces' tokens, (N,): generated ones before prompts'.
            segments: Of each piece how many tokens it has, the position of the first, ``GENERATED`` or ``PROMPT``, and
                its adapter's slot, (S, 4).
            tables: Of each piece the pages, (S, pages); what comes after those that are needed is not looked at.
            rows: For which tokens logits are wanted, (R,).

        Returns:
            Float32 logits, (R, vocabulary).
        """
        logits = np.empty((len(rows), self.vocabulary), np.float32)
        if len(tokens):
            if self.slots == 0 and segments[:, 3].any():
                raise ValueError("expected slot 0, as the model has no adapters")
            memory, adapters = self._memory, self._bytes
            self._step(tokens, segments, tables, rows, memory, self.page_tokens, adapters, self._empty, logits)
        return logits


class Rows:
    """A fixed number of sequences on a decoder, each with its pages, stepped together."""

    def __init__(self, decoder: Decoder, batch: int) -> None:
        self._decoder = decoder
        self._tables = np.full((batch, -(-decoder.context // decoder.page_tokens)), -1, np.int32)
        self._held = np.zeros(batch, np.int32)  # pages of each row
        # Of one generated token each; only positions change from step to step.
        self._segments = np.zeros((batch, 4), np.int32)
        self._segments[:, 0], self._segments[:, 2] = 1, GENERATED
        self._slots = np.zeros(batch, np.int32)
        self._all = np.arange(batch, dtype=np.int32)

    def choose(self, slots: Sequence[int] | np.ndarray) -> None:
        """Which adapter each row's sequence has, (B,), from the next step on; 0: none."""
        self._slots[:] = self._segments[:, 3] = slots

    def step(self, idx: np.ndarray, position: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Appends tokens to the sequences. A sequence that begins at position 0 takes the place of its row's old one.
        One token at a later position is a generated one, any other tokens are a prompt's.

        Args:
            idx: Token ids, (B, T) int32.
            position: Tokens that each sequence has already, (B,) int32.
            last: For which token of each row logits are wanted, (B,) int32. What comes after it is padding; -1 is for a
                row that has no token in this step.

        Returns:
            Float32 logits, (B, V); zeros for rows without a token.

        Raises:
            ValueError: as :meth:`Decoder.step`.
        """
        # This is run for every token, after a step that left nothing of it in the processor's caches.
        if idx.shape[1] == 1 and not last.any() and position.all():
            for row in np.flatnonzero(position >= self._held * self._decoder.page_tokens).tolist():
                self._hold(row, int(position[row]), 1)
            self._segments[:, 1] = position
            tokens = np.ascontiguousarray(idx.reshape(-1), np.int32)
            return self._decoder.run(tokens, self._segments, self._tables, self._all)
        most = idx.shape[1] if self._decoder.window is None else PROMPT_TOKENS
        logits = np.zeros((len(idx), self._decoder.vocabulary), np.float32)
        for begin in range(0, idx.shape[1], most):
            pieces, ended = [], []
            for row in np.flatnonzero(last >= begin).tolist():
                start, count = int(position[row]) + begin, min(int(last[row]) + 1 - begin, most)
                if start == 0:
                    self._release(row)
                self._hold(row, start, count)
                generated = idx.shape[1] == 1 and start > 0
                table, is_last = self._tables[row, : self._held[row]], begin + count > int(last[row])
                tokens = idx[row, begin : begin + count]
                wanted: list[int] | None = None if is_last else []
                pieces.append(Piece(tokens, start, table, generated, wanted, int(self._slots[row])))
                ended += [row] * is_last
            logits[ended] = self._decoder.step(pieces)
        return logits

    def _hold(self, row: int, start: int, count: int) -> None:
        """Sees to it that a row has pages for ``count`` tokens from ``start`` on, as far as the context goes. Those
        that none of them sees go back to the pool."""
        if self._decoder.window is not None:
            unseen = max(start + 1 - self._decoder.window, 0) // self._decoder.page_tokens
            self._give_back(row, unseen)
        needed = -(-min(start + count, self._decoder.context) // self._decoder.page_tokens)
        held = int(self._held[row])
        if needed > held:
            self._tables[row, held:needed] = self._decoder.pool.take(needed - held)
            self._held[row] = needed

    def _release(self, row: int) -> None:
        self._give_back(row, int(self._held[row]))
        self._held[row] = 0

    def _give_back(self, row: int, pages: int) -> None:
        """The first ``pages`` pages of a row, as far as it has them still."""
        first = self._tables[row, : min(pages, int(self._held[row]))]
        self._decoder.pool.release(first[first >= 0].tolist())
        first[:] = -1


@dataclass
class _Roles:
    """Which of a graph's inputs is what."""

    idx: Value
    position: Value
    cache: Value
    last: Value
    slot: Value | None
    tables: list[Value]
    prompts: Value | None
    vocabulary: int
    window: int | None

    @staticmethod
    def of(graph: Graph) -> _Roles | None:
        """None for a graph that is no decoder."""
        inputs = {entry.value for entry in graph.inputs}
        operations = {kind: [each for each in graph.operations if each.kind == kind] for kind in _KINDS}
        if not all(operations.values()) or {each.kind for each in graph.operations} - _KINDS - _ROW_BY_ROW:
            return None
        caches = [value for value in inputs if value.type.rank == 6]
        arrays = [value for value in graph.outputs if value.type.rank == 2 and value.type.dtype == "f32"]
        products = [each for each in graph.operations if each.kind == "low_rank"]
        slots = {each.operands[1] for each in products}
        adapters = {value for each in products for value in each.operands[2:]}
        tables = [entry.value for entry in graph.inputs if entry.value in adapters]
        prompts = {value for each in operations["embedding"] for value in each.operands[6:]}
        if len(tables) != len(adapters) or len({value.type.shape[0] for value in tables}) > 1 or len(slots) > 1:
            return None
        if (
            len(inputs) != 4 + len(tables) + len(slots) + len(prompts)
            or len(prompts) > 1
            or len(caches) != 1
            or len(arrays) != 1
            or len(graph.outputs) != 2
        ):
            return None
        idx = {each.operands[0] for each in operations["embedding"]}
        position = {each.operands[1] for each in operations["embedding"] if each.attributes["position_dtype"]}
        position |= {each.operands[2] for each in operations["attention"]}
        last = {each.operands[1] for each in operations["last_rows"]}
        vocabulary = arrays[0].type.shape[-1]
        if len(idx) != 1 or len(position) != 1 or len(last) != 1 or not isinstance(vocabulary, int):
            return None
        found = (*idx, *position, caches[0], *last)
        given = {each for each in (*found, *slots, *tables, *prompts) if each is not None}
        if given != inputs or not all(value.type.is_static for value in (caches[0], *tables, *prompts) if value):
            return None
        first, second, third, fourth = (each for each in found if each is not None)
        windows = [each.attributes["window"] for each in operations["attention"]]
        window = None if None in windows else max(windows)
        chosen, beyond = (next(iter(each), None) for each in (slots, prompts))
        return _Roles(first, second, third, fourth, chosen, tables, beyond, vocabulary, window)


def _sizes(type: TensorType) -> tuple[int, ...]:
    """The shape of a type that is static."""
    return tuple(int(each) for each in type.shape)  # type: ignore[arg-type]


_KINDS = {"embedding", "attention", "last_rows"}
_ROW_BY_ROW = {"linear", "low_rank", "plugin", "finish", "layer_norm", "rms_norm", "constant"}


class _Interpreted:
    """The same by NumPy: one sequence after the other, as the graph has it, out of its pages and back."""

    def __init__(self, plan: Plan, graph: Graph, roles: _Roles) -> None:
        self._plan, self._roles = plan, roles
        self._inputs = [entry.value for entry in graph.inputs]
        self._outputs = graph.outputs

    def step(
        self,
        tokens: np.ndarray,
        segments: np.ndarray,
        tables: np.ndarray,
        rows: np.ndarray,
        memory: np.ndarray,
        page_tokens: int,
        adapters: list[np.ndarray],
        empty: np.ndarray,
        logits: np.ndarray,
    ) -> None:
        start = 0
        with contextlib.ExitStack() as undo:  # if anything is found wrong
            for (count, position, _, slot), table in zip(segments.tolist(), tables, strict=True):
                chosen = self._chosen(slot, adapters)
                held = table[: -(-(position + count) // page_tokens)]
                window = self._roles.window
                seen = held[0 if window is None else max(position + 1 - window, 0) // page_tokens :]
                if len(held) * page_tokens < position + count or (seen < 0).any() or (seen >= len(memory)).any():
                    raise ValueError(f"expected pages for {position + count} tokens but got {table.tolist()}")
                here = np.nonzero((rows >= start) & (rows < start + count))[0]
                ids = tokens[start : start + count]
                unseen = len(held) - len(seen)
                held = np.concatenate([np.full(unseen, seen[0]), seen]) if unseen else held  # whatever they hold
                # The graph gives one row's logits; whichever, its cache is the same.
                for row in {*(rows[here] - start).tolist(), count - 1} if count else ():
                    found, cache = self._run(ids, position, row, memory, held, chosen)
                    logits[here[rows[here] - start == row]] = found
                if count:
                    undo.callback(memory.__setitem__, seen, memory[seen])
                    memory[seen] = self._paged(cache, len(held), page_tokens)[unseen:]
                start += count
            undo.pop_all()

    def _chosen(self, slot: int, adapters: list[np.ndarray]) -> dict[Value, np.ndarray]:
        values = [value for value in (self._roles.prompts, *self._roles.tables) if value is not None]
        given = {
            value: each.view(DTYPES[value.type.dtype]).reshape(_sizes(value.type))
            for value, each in zip(values, adapters, strict=True)
        }
        if self._roles.slot is not None:
            given[self._roles.slot] = np.full(_sizes(self._roles.slot.type), slot, np.int32)
        return given

    def _run(
        self,
        ids: np.ndarray,
        position: int,
        row: int,
        memory: np.ndarray,
        held: np.ndarray,
        chosen: dict[Value, np.ndarray],
    ) -> tuple[np.ndarray, np.ndarray]:
        type = self._roles.cache.type
        layers, two, batch, heads, context, size = _sizes(type)
        cache = np.zeros((layers, two, batch, heads, context, size), DTYPES[type.dtype])
        filled = np.moveaxis(memory[held].view(DTYPES[type.dtype]), 0, 3)  # (L, 2, H, pages, P, D)
        filled = filled.reshape(layers, two, heads, -1, size)[:, :, :, :context]
        cache[:, :, 0, :, : filled.shape[3]] = filled
        given = {
            self._roles.idx: np.tile(ids, (batch, 1)).astype(np.int32),
            self._roles.position: np.full(batch, position, np.int32),
            self._roles.cache: cache,
            self._roles.last: np.full(batch, row, np.int32),
            **chosen,
        }
        try:
            outputs = interpreter.run(self._plan, [given[each] for each in self._inputs])
        except ExecutionError as error:
            raise (PluginError if isinstance(error.__cause__, PluginError) else ValueError)(str(error)) from None
        is_first = self._outputs[0].type.rank == 2
        return outputs[not is_first][0], outputs[is_first][:, :, 0]

    @staticmethod
    def _paged(cache: np.ndarray, count: int, page_tokens: int) -> np.ndarray:
        layers, two, heads, context, size = cache.shape
        room = np.zeros((layers, two, heads, count * page_tokens, size), cache.dtype)
        filled = min(context, count * page_tokens)
        room[:, :, :, :filled] = cache[:, :, :, :filled]
        return raw(np.ascontiguousarray(np.moveaxis(room.reshape(layers, two, heads, count, page_tokens, size), 3, 0)))

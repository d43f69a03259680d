"""Adapters by the names that requests call them: read when the server starts or while it runs, and dropped again."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import AdapterError
from adapters.folding import Folded
from adapters.lora import Base, Lora, read_lora
from adapters.nemo_lora import SUFFIX as NEMO_SUFFIX
from serving.adapters import Adapter


@dataclass(frozen=True)
class Named:
    """An adapter or a task's prompt under a name.

    Attributes:
        adapter: None of a prompt.
        created: Since when it is there, in seconds since 1970.
        virtual: Ids of the prompt's virtual tokens.
    """

    name: str
    adapter: Adapter | None
    created: int
    virtual: Sequence[int] = ()


class AdapterNames:
    """The adapters that there are.

    Args:
        base: The model that they are for.
        ranks: The largest that the engine has room for, for each linear layer of a block.
        most: How many are kept in memory. One more drops the one that no request has named for the longest time.
        folder: Clients may have those loaded that lie in it; None: none.
        prompts: Virtual tokens of tasks, by the tasks' names, which stay.
        folded: Scales that the base has in its norms.
    """

    def __init__(
        self,
        base: Base,
        ranks: tuple[int, ...],
        most: int,
        folder: Path | None = None,
        prompts: Mapping[str, Sequence[int]] | None = None,
        folded: Folded | None = None,
    ) -> None:
        self._base, self._ranks, self._most, self._folder = base, ranks, most, folder
        self._named: dict[str, Named] = {}  # who was named last comes last
        self._folded = folded or {}
        now = int(time.time())
        self._prompts = {name: Named(name, None, now, ids) for name, ids in (prompts or {}).items()}
        self._lock = threading.Lock()

    def read(self, name: str, path: Path) -> Named:
        """Reads an adapter, which is under this name from then on.

        Raises:
            AdapterError: it cannot be used.
        """
        return self.add(name, read_lora(path, self._base))

    def add(self, name: str, lora: Lora) -> Named:
        """Puts an adapter under a name.

        Raises:
            AdapterError: the engine has no room for its rank.
        """
        if name in self._prompts:
            raise AdapterError(f"expected a name that is no prompt's but got {name!r}")
        for rank, room in zip(lora.ranks, self._ranks, strict=True):
            if rank > room:
                raise AdapterError(
                    f"{lora.name}: expected a rank of at most that of --max-lora-rank but got {rank}, of {room}"
                )
        adapter = Adapter(name, lora.unfolded(self._folded).tables(self._ranks))
        _ = adapter.key  # which takes some milliseconds: here, and not where the engine waits for it
        named = Named(name, adapter, int(time.time()))
        with self._lock:
            self._named.pop(name, None)
            while len(self._named) >= self._most:
                del self._named[next(iter(self._named))]
            self._named[name] = named
        return named

    def read_for_client(self, name: str, path: str) -> Named:
        """:meth:`read`, of a folder or a .nemo file within the folder that clients may choose from.

        Raises:
            AdapterError: also where there is none.
        """
        if self._folder is None:
            raise AdapterError("adapters are loaded while the server runs only where it was started with --lora-dir")
        root = self._folder.resolve()
        found = (root / path).resolve() if "\0" not in path else root.parent
        if not found.is_relative_to(root) or not (found.is_dir() or (found.suffix == NEMO_SUFFIX and found.is_file())):
            raise AdapterError(
                f"expected lora_path to be a folder in that of --lora-dir, or a {NEMO_SUFFIX} file, but got {path!r}"
            )
        return self.read(name, found)

    def drop(self, name: str) -> bool:
        """Whether there was one of this name. Requests that have it already keep it."""
        with self._lock:
            return self._named.pop(name, None) is not None

    def find(self, name: str) -> Named | None:
        """The adapter of a name, which counts as used, or the prompt."""
        if name in self._prompts:
            return self._prompts[name]
        with self._lock:
            named = self._named.pop(name, None)
            if named is not None:
                self._named[name] = named
            return named

    def all(self) -> list[Named]:
        """Every one, by name."""
        with self._lock:
            found = self._named | self._prompts
        return [found[name] for name in sorted(found)]

"""Damaged files made from sound ones, for fuzzing: Hypothesis draws the damage, and finds the least of it that fails.

Two kinds: of the tree of values that a file holds (something is removed, moved, doubled, renamed, or becomes another
value), and of the bytes that the file is.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]


def fuzzing(mutations: int) -> settings:
    """So many mutations, the same in every run: a failure on one machine is one on all."""
    return settings(
        max_examples=mutations,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )


#: Numbers at the edges of what programs and file formats hold.
_NUMBERS = [
    *(-1, 0, 1, 2, 3, 7, 255, 256, 257, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64),
    *(10**30, -(2**31), -(2**63) - 1, 0.0, -0.0, 0.5, 1.0, 1e-5, 1e-45, 1e-300, 1e300, math.nan, math.inf, -math.inf),
]
#: Texts that are something to nobody, or to somebody.
_TEXTS = [
    *("", " ", "\n", "\0", "true", "0", "-1", "1e5", "null", "\u00e9", "\ud800", "\U0010ffff", "a" * 300, "../x", "%s"),
    "{}",
]
#: Depth at which recursive readers give up.
_DEEP = 100_000


def values(words: list[Any]) -> st.SearchStrategy[Any]:
    """Any JSON value; `words` are those that mean something to the file's reader, texts or not."""
    scalars = st.one_of(
        st.sampled_from([*words, *words]),
        st.sampled_from([None, True, False]),
        st.sampled_from(_NUMBERS),
        st.integers(-3, 70_000),
        st.floats(),
        st.sampled_from(_TEXTS),
        st.text(max_size=3),
    )
    lists = st.lists(scalars, max_size=3)
    return st.one_of(scalars, scalars, lists, st.dictionaries(keys(words), scalars, max_size=2))


def keys(words: list[Any]) -> st.SearchStrategy[str]:
    return st.sampled_from([word for word in words if isinstance(word, str)])


def mutated_tree(draw: Draw, tree: Any, words: list[Any]) -> Any:
    """A copy of a tree of dicts and lists with one to three changes. Other objects in it are leaves."""
    root = [copy.deepcopy(tree)]  # so that the whole tree is somebody's child, too
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        parent, key = _place(draw, root)
        change = draw(st.sampled_from(["set", "set", "remove", "double", "rename", "swap", "wrap", "add"]))
        _change(draw, root, parent, key, change, words)
    return root[0]


def _place(draw: Draw, root: list[Any]) -> tuple[Any, Any]:
    """A container in the tree, and one of its keys: deeper places are as likely as those at the top."""
    parent, key = root, 0
    while isinstance(parent[key], (dict, list)) and parent[key] and draw(st.integers(0, 3)):
        parent = parent[key]
        keys = list(parent) if isinstance(parent, dict) else range(len(parent))
        key = keys[draw(st.integers(0, len(keys) - 1))]
    return parent, key


def _change(draw: Draw, root: list[Any], parent: Any, key: Any, change: str, words: list[Any]) -> None:
    new_key = draw(keys(words)) if isinstance(parent, dict) else None
    if change == "remove" and parent is not root:
        del parent[key]
    elif change == "double" and isinstance(parent, list) and parent is not root:
        parent.insert(key, copy.deepcopy(parent[key]))
    elif change == "double" and isinstance(parent, dict):
        parent[new_key] = copy.deepcopy(parent[key])
    elif change == "rename" and isinstance(parent, dict):
        parent[new_key] = parent.pop(key)
    elif change == "swap":
        other_parent, other_key = _place(draw, root)
        parent[key], other_parent[other_key] = copy.deepcopy((other_parent[other_key], parent[key]))
    elif change == "wrap":
        parent[key] = [parent[key]] if draw(st.booleans()) else {"content": parent[key]}
    elif change == "add" and isinstance(parent, dict):
        parent[new_key] = draw(values(words))
    else:
        parent[key] = draw(values(words))


def mutated_bytes(draw: Draw, content: bytes) -> bytes:
    """A file with one to three places damaged."""
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(content)))
        end = min(len(content), begin + draw(st.sampled_from([0, 1, 1, 2, 8, 64])))
        how = draw(st.sampled_from(["cut", "end", "put", "double"]))
        if how == "end":
            content = content[:begin]
        elif how == "double":
            content = content[:end] + content[begin:]
        else:
            content = content[:begin] + (draw(st.binary(max_size=4)) if how == "put" else b"") + content[end:]
    return content


def fuzz_json(
    path: Path, tree: Any, words: list[Any], mutations: int, check: Callable[[], bool], at_least: int
) -> None:
    """Writes damaged versions of a JSON file, and has each looked at.

    Args:
        path: The file.
        tree: What it holds when it is sound.
        words: See `values`.
        mutations: How many are tried.
        check: Raises where something is wrong with the program; otherwise says whether the file was of use.
        at_least: How many have to have been: without them nothing would have been tried.
    """
    useful = 0

    @fuzzing(mutations)
    @given(st.data())
    def fuzz(data: st.DataObject) -> None:
        nonlocal useful
        path.write_bytes(mutated_json(data.draw, tree, words))
        useful += check()

    fuzz()
    assert useful >= at_least


def mutated_json(draw: Draw, tree: Any, words: list[Any]) -> bytes:
    """A JSON file: most often one that is still JSON."""
    kind = draw(st.sampled_from(["tree"] * 12 + ["bytes"] * 3 + ["deep"]))
    if kind == "deep":
        return draw(st.sampled_from([b"[", b'{"a":'])) * _DEEP
    if kind == "bytes":
        return mutated_bytes(draw, json.dumps(tree).encode())
    return json.dumps(mutated_tree(draw, tree, words)).encode()

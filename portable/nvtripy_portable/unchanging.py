"""Memory of the caller's that the compiler may keep instead of a copy, because nobody will ever change it.

A compiled function owns its constants: who changes an array after compiling it in changes nothing. For weights that is
a copy of all of them, and the time that it takes; a program that made them for the model alone says so::

    tensor = tp.Tensor(never_changes(array))
"""

from __future__ import annotations

import weakref

import numpy as np

_sizes: dict[int, int] = {}  # by the address of the memory


def never_changes(array: np.ndarray) -> np.ndarray:
    """The array itself, which has to own its memory. Whoever changes it later changes what is compiled of it.

    Raises:
        ValueError: it is a view of another array's memory.
    """
    if not array.flags.owndata:
        raise ValueError("expected an array that owns its memory but got a view")
    address = _address(array)
    _sizes[address] = array.nbytes
    weakref.finalize(array, _sizes.pop, address, None).atexit = False
    return array


def is_unchanging(array: np.ndarray) -> bool:
    """Whether the array, not a view of it, lies at the start of such memory."""
    return array.nbytes <= _sizes.get(_address(array), -1)


def _address(array: np.ndarray) -> int:
    address: int = array.__array_interface__["data"][0]
    return address

"""Affine maps, as far as a transpose needs them."""

from __future__ import annotations

from collections.abc import Sequence


class AffineMap:
    @staticmethod
    def get_permutation(permutation: Sequence[int]) -> tuple[int, ...]:
        """A permutation stands for itself."""
        return tuple(permutation)

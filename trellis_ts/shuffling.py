"""A random order of any number of things, of which any stretch can be computed by itself."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_NUM_ROUNDS = 8


class RandomOrder:
    """The numbers from 0 to ``size - 1``, each once, in an order fixed by the seed; nothing is stored.

    A place is written as two digits to a base of about the square root of the size. In each round of a Feistel network
    (Luby and Rackoff 1988) a hash of one digit is added to the other, which can be undone, so that different places
    give different numbers. The few results beyond the size go through the network again until they are below it
    (cycle walking, Black and Rogaway 2002), which keeps them different too.

    Args:
        size: how many there are.
        seed: whole numbers from 0 on.
    """

    def __init__(self, size: int, seed: Sequence[int]) -> None:
        self.size = size
        self._base = np.uint64(math.isqrt(max(size, 1) - 1) + 1)
        self._keys = np.random.SeedSequence(seed).generate_state(_NUM_ROUNDS, np.uint64)

    def at(self, start: int, stop: int) -> NDArray[np.int64]:
        """What lies at the places from ``start`` up to ``stop``."""
        found = self._permuted(np.arange(start, stop, dtype=np.uint64))
        while (outside := found >= self.size).any():
            found[outside] = self._permuted(found[outside])
        return found.astype(np.int64)

    def _permuted(self, places: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = np.divmod(places, self._base)
        for key in self._keys:
            left, right = right, (left + _hash(right ^ key) % self._base) % self._base
        return left * self._base + right


def _hash(number: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014); products wrap around."""
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return number ^ (number >> np.uint64(31))

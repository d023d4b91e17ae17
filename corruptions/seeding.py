"""Random draws that depend on nothing but a seed of bytes.

Only the raw 64-bit words of the Philox counter generator are taken from numpy, since numpy keeps
those stable between versions; its distributions may change (NEP 19). The same prompt must get the
same corruption on every replica and after every upgrade.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from guard.types import FloatArray, IntArray


class Draws:
    """A stream of random draws.

    Args:
        seed: Any bytes; every bit matters. Serving gives HMAC(secret, target, text).
    """

    def __init__(self, seed: bytes) -> None:
        key = np.frombuffer(hashlib.sha256(seed).digest()[:16], dtype="<u8").astype(np.uint64)
        self._bits = np.random.Philox(key=key)

    def words(self, count: int) -> NDArray[np.uint64]:
        """Return `count` random 64-bit words."""
        return np.asarray(self._bits.random_raw(count), dtype=np.uint64).reshape(count)

    def normal(self, rows: int, columns: int) -> FloatArray:
        """Return standard normal draws, shape (rows, columns), by Box and Muller's transform."""
        count = rows * columns
        half = (count + 1) // 2
        # 53 bits, shifted into (0, 1]: log(0) never happens.
        uniform = ((self.words(2 * half) >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53
        radius = np.sqrt(-2.0 * np.log(uniform[:half]))
        angle = 2.0 * np.pi * uniform[half:]
        both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        return both[:count].reshape(rows, columns).astype(np.float32)

    def permutation(self, count: int) -> IntArray:
        """Return the numbers below `count` in random order."""
        return np.argsort(self.words(count), kind="stable").astype(np.int64)

    def integers(self, below: int, count: int) -> IntArray:
        """Return `count` numbers in [0, below); the modulo's bias is below 2**-32."""
        return (self.words(count) % np.uint64(below)).astype(np.int64)

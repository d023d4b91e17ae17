"""A target's prototypes: its forget rows in the shared space, few and small.

Each is a direction of 256 bytes. Rows beyond a limit are condensed into the means of clusters, so
that the storage of a target is bounded. They are encrypted all the same: embeddings can be
inverted to a good part of their text (docs/bundle.md).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from classifiers.space import unit
from guard.types import FloatArray

MAX_PROTOTYPES = 288
ROUNDS = 8
LEVELS = 127.0

ByteArray = NDArray[np.int8]


def condense(rows: FloatArray, limit: int) -> FloatArray:
    """Return at most `limit` directions that stand for all rows, shape (rows, dimensions).

    Greedy: rows that are nearly the same as one chosen already go first; the rest are clustered
    by spherical k-means, seeded by the rows that are farthest apart.
    """
    distinct = _distinct(unit(rows))
    if len(distinct) <= limit:
        return distinct
    centres = distinct[_spread_out(distinct, limit)]
    for _ in range(ROUNDS):
        nearest = np.argmax(distinct @ centres.T, axis=1)
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, distinct)
        empty = np.linalg.norm(sums, axis=1) < 1e-9
        centres = np.where(empty[:, None], centres, unit(sums))
    return np.asarray(centres, np.float32)


def to_bytes(rows: FloatArray) -> ByteArray:
    """Return directions in 8 bits, shape (rows, dimensions); a scale is not needed."""
    peak = np.abs(rows).max(axis=1, keepdims=True) if rows.size else np.ones((len(rows), 1))
    return np.rint(rows / np.maximum(peak, 1e-9) * LEVELS).astype(np.int8)


def from_bytes(rows: ByteArray) -> FloatArray:
    """Return the directions of `to_bytes` at length 1."""
    return unit(rows.astype(np.float32))


def _distinct(rows: FloatArray, alike: float = 0.995) -> FloatArray:
    kept, count = np.empty_like(rows), 0
    for row in rows:
        if not count or float((kept[:count] @ row).max()) < alike:
            kept[count] = row
            count += 1
    return kept[:count].copy()


def _spread_out(rows: FloatArray, count: int) -> list[int]:
    chosen = [0]
    nearest = rows @ rows[0]
    while len(chosen) < count:
        farthest = int(np.argmin(nearest))
        chosen.append(farthest)
        nearest = np.maximum(nearest, rows @ rows[farthest])
    return chosen

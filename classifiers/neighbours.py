"""The nearest forget rows of any target (FAISS): which targets deserve a full score?

Exact search while there are few rows; from FLAT_ROWS on an inverted file, so that 10,000 targets
cost a text about as much as one.
"""

from __future__ import annotations

from collections.abc import Sequence

import faiss
import numpy as np

from classifiers.space import unit
from guard.types import FloatArray

FLAT_ROWS = 8_000
ROWS_PER_LIST = 100
PROBES = 6
TRAINED_ROWS_PER_LIST = 40
SEED = 1234


class PrototypeIndex:
    """Finds the targets whose rows are nearest to a window; safe to share between threads.

    Args:
        prototypes: Each target's directions, shape (rows, dimensions).
        dimensions: Size of the space.
    """

    def __init__(self, prototypes: Sequence[FloatArray], dimensions: int) -> None:
        rows = [mine for mine in prototypes if len(mine)]
        joined = np.concatenate(rows) if rows else np.zeros((0, dimensions), np.float32)
        sizes = [len(mine) for mine in prototypes]
        self._owners = np.repeat(np.arange(len(prototypes)), sizes)
        self._index = _build(np.ascontiguousarray(joined, np.float32), dimensions)

    def targets(self, rows: FloatArray, count: int) -> list[int]:
        """Return the targets nearest to any of the windows, nearest first.

        Args:
            rows: Windows in the shared space, shape (windows, dimensions).
            count: Targets per window at most.
        """
        if not len(self._owners) or not len(rows):
            return []
        wanted = min(2 * count, len(self._owners))
        cosines, found = self._index.search(np.ascontiguousarray(unit(rows)), wanted)
        best: dict[int, float] = {}
        for near, places in zip(cosines, found, strict=True):
            mine: set[int] = set()
            for cosine, place in zip(near.tolist(), places.tolist(), strict=True):
                if place < 0 or len(mine) >= count:
                    continue
                owner = int(self._owners[place])
                mine.add(owner)
                best[owner] = max(cosine, best.get(owner, -1.0))
        return sorted(best, key=lambda owner: (-best[owner], owner))


def _build(rows: FloatArray, dimensions: int) -> faiss.Index:
    # One thread a search: several workers search at a time, each on a core of its own.
    faiss.omp_set_num_threads(1)
    if len(rows) < FLAT_ROWS:
        flat = faiss.IndexFlatIP(dimensions)
        flat.add(rows)
        return flat
    lists = len(rows) // ROWS_PER_LIST
    coarse = faiss.IndexFlatIP(dimensions)
    kind = faiss.ScalarQuantizer.QT_8bit
    index = faiss.IndexIVFScalarQuantizer(
        coarse, dimensions, lists, kind, faiss.METRIC_INNER_PRODUCT
    )
    index.cp.seed, index.cp.niter = SEED, 8
    chosen = np.random.default_rng(SEED).permutation(len(rows))[: TRAINED_ROWS_PER_LIST * lists]
    index.train(rows[chosen])
    index.add(rows)
    index.nprobe = min(PROBES, lists)
    return index

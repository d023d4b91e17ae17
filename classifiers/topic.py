"""The topic head of a target: a regularised least-squares classifier in the shared space.

What a fine-tuned ECO classifier decides by gradient descent is here a linear system of 257
unknowns (forget rows against benign, retain and synthetic neighbouring ones, each kind weighing
the same whatever its size), so that a target is learned in milliseconds and its held-out scores
come from as many systems as there are folds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from guard.errors import NotFittedError
from guard.types import FloatArray

PENALTY = 3e-3
"""Ridge penalty per unit of sample weight, in whitened units."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums over the windows of one kind of text in one fold.

    Attributes:
        gram: Sum of weight · x xᵀ, x with a one appended, shape (dimensions + 1, dimensions + 1).
        total: Sum of weight · x, shape (dimensions + 1,); its last entry is the sum of weights.
    """

    gram: FloatArray
    total: FloatArray

    @classmethod
    def of(cls, rows: FloatArray, weights: FloatArray | None = None) -> Moments:
        """Sum over rows, shape (rows, dimensions), that weigh 1 each by default."""
        ones = np.ones((len(rows), 1), np.float32)
        points = np.concatenate([rows, ones], axis=1)
        scaled = points if weights is None else points * weights[:, None]
        return cls(scaled.T @ points, scaled.sum(axis=0))

    @classmethod
    def sum(cls, parts: Sequence[Moments]) -> Moments:
        """Add the moments of several folds."""
        return cls(
            np.asarray(sum(part.gram for part in parts)),
            np.asarray(sum(part.total for part in parts)),
        )

    @property
    def size(self) -> float:
        """Sum of the weights."""
        return float(self.total[-1])


def fit_ridge(positive: Moments, negatives: Sequence[Moments]) -> FloatArray:
    """Fit the head: +1 on forget rows, -1 on all others.

    Args:
        positive: Moments of the forget rows.
        negatives: Moments of each kind of other rows; kinds without rows are left out, the others
            weigh the same.

    Returns:
        Weights of the components and, last, the intercept, shape (dimensions + 1,).

    Raises:
        NotFittedError: If there are no forget rows or no others.
    """
    kinds = [kind for kind in negatives if kind.size > 0]
    if positive.size <= 0 or not kinds:
        raise NotFittedError("the topic head needs forget texts and other texts")
    share = 0.5 / len(kinds)
    gram = 0.5 * positive.gram / positive.size
    pull = 0.5 * positive.total / positive.size
    for kind in kinds:
        gram = gram + share * kind.gram / kind.size
        pull = pull - share * kind.total / kind.size
    penalty = np.full(len(pull), PENALTY)
    penalty[-1] = 1e-6
    system = gram.astype(np.float64) + np.diag(penalty)
    return np.linalg.solve(system, pull.astype(np.float64)).astype(np.float32)


def apply(weight: FloatArray, rows: FloatArray) -> FloatArray:
    """Return the head's score of each row, shape (rows, dimensions) -> (rows,)."""
    return np.asarray(rows @ weight[:-1] + weight[-1], np.float32)

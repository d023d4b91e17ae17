"""Folds of whole clusters, so that held-out texts differ from training texts as traffic does."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from guard.types import FloatArray

CLUSTERS = 64
ROUNDS = 10


def cluster_folds(points: FloatArray, folds: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Deal clusters of similar points (spherical k-means) into folds of about equal size.

    Args:
        points: Features, shape (texts, dimensions).
        folds: Number of folds.
        rng: Chooses the first centres.

    Returns:
        The fold of each text, shape (texts,).
    """
    if len(points) < 2 * folds:
        return np.arange(len(points)) % folds
    points = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-9)
    count = min(CLUSTERS, len(points) // 2)
    centres = points[rng.choice(len(points), count, replace=False)]
    for _ in range(ROUNDS):
        nearest = np.argmax(points @ centres.T, axis=1)
        for cluster in range(count):
            if (nearest == cluster).any():
                centre = points[nearest == cluster].mean(axis=0)
                centres[cluster] = centre / max(float(np.linalg.norm(centre)), 1e-9)
    sizes, dealt = np.zeros(folds), np.zeros(len(points), np.int64)
    for cluster in np.argsort(-np.bincount(nearest, minlength=count), kind="stable"):
        fold = int(np.argmin(sizes))
        dealt[nearest == cluster] = fold
        sizes[fold] += (nearest == cluster).sum()
    return dealt

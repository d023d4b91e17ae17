"""Weighted logistic regression with signs: the fusion of evidence is fitted by it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import numpy as np

from classifiers.evidence import SIGNS, Fusion
from guard.types import BoolArray, FloatArray

PENALTY = 1e-4


def fit_fusion(points: FloatArray, labels: BoolArray, weights: FloatArray, start: Fusion) -> Fusion:
    """Fit by L-BFGS on weighted cross-entropy; no weight against its sign (`evidence.SIGNS`).

    Args:
        points: What `evidence.terms` gives, shape (rows, terms).
        labels: True for forget texts, shape (rows,).
        weights: Weights of the rows, together 1, shape (rows,).
        start: Where to begin.
    """
    minimize = importlib.import_module("scipy.optimize").minimize
    bounds: Sequence[tuple[float | None, float | None]] = [
        *((0.0, None) if sign > 0 else (None, 0.0) for sign in SIGNS),
        (None, None),
    ]
    found = minimize(
        _loss,
        np.append(np.array(start.weights), start.bias),
        (points.astype(np.float64), labels, weights),
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options={"maxiter": 2000, "ftol": 1e-10},
    ).x
    return Fusion(tuple(round(float(v), 4) for v in found[:-1]), round(float(found[-1]), 4))


def _loss(
    point: FloatArray, points: FloatArray, labels: BoolArray, weights: FloatArray
) -> tuple[float, FloatArray]:
    """Weighted cross-entropy and its gradient."""
    signs = np.where(labels, 1.0, -1.0)
    margin = signs * (points @ point[:-1] + point[-1])
    value = float(weights @ np.logaddexp(0.0, -margin))
    value += PENALTY / 2 * float(point[:-1] @ point[:-1])
    pull = -weights * signs * np.exp(-np.logaddexp(0.0, margin))
    return value, np.append(pull @ points + PENALTY * point[:-1], pull.sum())

"""ECO's prompt classifier: does a prompt ask for what was to be forgotten?

A linear head over the encoder's pooled states of all layers, trained with class-weighted
cross-entropy, forget prompts against retain and benign ones; then joined with the lexicon's
numbers.
Paper: Liu et al. 2024, arXiv 2406.07933. Differs from the reference code: that fine-tunes a whole
RoBERTa on texts truncated to 512 tokens; here the encoder is frozen and shared by all targets, the
head sees windows, and L2 shrinkage is the only regularisation.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from guard.errors import ArtifactError, DataError, ShapeError
from guard.types import FloatArray

PENALTY = 2e-2
"""L2 penalty per unit of sample weight on the standardised features."""

STACK_PENALTY = 1e-4
"""The same for the few inputs of the joint head."""


@dataclass(frozen=True, slots=True)
class LinearHead:
    """A linear classifier with its standardisation.

    Attributes:
        weight: Weights of the standardised inputs, shape (inputs,).
        bias: Intercept.
        mean: Mean of each input, shape (inputs,).
        scale: What each centred input is divided by, shape (inputs,).
    """

    weight: FloatArray
    bias: float
    mean: FloatArray
    scale: FloatArray

    def logits(self, inputs: FloatArray) -> FloatArray:
        """Return the logit of each row of `inputs`, shape (rows, inputs) -> (rows,)."""
        if inputs.shape[1:] != self.weight.shape:
            raise ShapeError(f"{inputs.shape[1:]} inputs for a head of {self.weight.shape}")
        slope, offset = self.folded()
        return np.asarray(inputs @ slope + offset, np.float32)

    def folded(self) -> tuple[FloatArray, float]:
        """Return weight and bias that act on the inputs as they are."""
        slope = (self.weight / self.scale).astype(np.float32)
        return slope, float(self.bias - self.mean.astype(np.float64) @ slope.astype(np.float64))

    def to_arrays(self) -> dict[str, FloatArray]:
        """Return the head as arrays, for safetensors."""
        return {
            "weight": self.weight,
            "bias": np.array([self.bias], np.float32),
            "mean": self.mean,
            "scale": self.scale,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, FloatArray]) -> LinearHead:
        """Read what `to_arrays` gave.

        Raises:
            ArtifactError: If an array is missing, of the wrong shape or not finite.
        """
        try:
            weight, bias, mean, scale = (arrays[k] for k in ("weight", "bias", "mean", "scale"))
        except KeyError as error:
            raise ArtifactError(f"the detector head lacks the array {error}") from error
        same = weight.ndim == 1 and weight.shape == mean.shape == scale.shape
        if not same or bias.shape != (1,) or not (scale > 0).all():
            raise ArtifactError("the detector head's arrays do not fit together")
        if not all(np.isfinite(array).all() for array in (weight, bias, mean, scale)):
            raise ArtifactError("the detector head holds numbers that are not finite")
        return cls(weight, float(bias[0]), mean, scale)


def class_weights(labels: NDArray[np.int64], importance: FloatArray | None = None) -> FloatArray:
    """Return sample weights that sum to 1, half of it for each class.

    Args:
        labels: 0 or 1, shape (rows,).
        importance: Relative weight within a class, shape (rows,); equal by default.
    """
    base = np.ones(len(labels)) if importance is None else importance.astype(np.float64)
    out = np.zeros(len(labels))
    for label in (0, 1):
        chosen = labels == label
        if not chosen.any():
            raise DataError("the classifier needs both forget texts and other texts")
        out[chosen] = 0.5 * base[chosen] / base[chosen].sum()
    return out.astype(np.float32)


def fit_logistic(
    inputs: FloatArray,
    labels: NDArray[np.int64],
    weights: FloatArray,
    penalty: float,
    start: tuple[FloatArray, float] | None = None,
) -> tuple[FloatArray, float]:
    """Fit weight and bias by L-BFGS on weighted cross-entropy plus `penalty` / 2 · ‖weight‖².

    Args:
        inputs: Standardised inputs, shape (rows, inputs), float32.
        labels: 0 or 1, shape (rows,).
        weights: Sample weights that sum to 1, shape (rows,).
        penalty: Higher is smoother and less confident; sensible between 1e-4 and 1e-1.
        start: Weight and bias to start from, e.g. another fold's.
    """
    minimize = importlib.import_module("scipy.optimize").minimize
    signs = np.where(labels == 1, 1.0, -1.0).astype(np.float32)

    def loss(point: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weight = point[:-1].astype(np.float32)
        margin = signs * (inputs @ weight + np.float32(point[-1]))
        value = float(weights @ np.logaddexp(0.0, -margin))
        value += penalty / 2 * float(point[:-1] @ point[:-1])
        pull = -weights * signs * np.exp(-np.logaddexp(0.0, margin))
        slope = (pull @ inputs).astype(np.float64) + penalty * point[:-1]
        return value, np.append(slope, float(pull.sum()))

    first = np.zeros(inputs.shape[1] + 1)
    if start is not None:
        first = np.append(start[0], start[1]).astype(np.float64)
    options = {"maxiter": 200, "ftol": 1e-7, "gtol": 1e-5}
    found = minimize(loss, first, jac=True, method="L-BFGS-B", options=options).x
    return found[:-1].astype(np.float32), float(found[-1])


def stack(
    topic: LinearHead,
    held_out: FloatArray,
    names: FloatArray,
    labels: NDArray[np.int64],
    weights: FloatArray,
) -> LinearHead:
    """Join the topic head with the lexicon's numbers; the result is linear again.

    How much a name says against the topic is learned from held-out topic logits: on texts that
    the topic head was trained on it looks better than it is, and names would count for nothing.

    Args:
        topic: Head over the encoder's features, fitted on all rows.
        held_out: Topic logits of heads that did not see the row, shape (rows,).
        names: The lexicon's numbers, shape (rows, columns).
        labels: 0 or 1, shape (rows,).
        weights: Sample weights that sum to 1, shape (rows,).

    Returns:
        A head over features and lexicon numbers, in this order.
    """
    inputs = np.concatenate([held_out[:, None], names], axis=1).astype(np.float32)
    spread = np.maximum(inputs.std(axis=0), 0.1)
    slope, bias = fit_logistic(inputs / spread, labels, weights, STACK_PENALTY)
    # More names or a closer topic never speak against the target.
    slope = np.maximum(slope / spread, 0.0)
    ones = np.ones(names.shape[1], np.float32)
    return LinearHead(
        np.concatenate([slope[0] * topic.weight, slope[1:]]),
        float(slope[0] * topic.bias + bias),
        np.concatenate([topic.mean, 0 * ones]),
        np.concatenate([topic.scale, ones]),
    )

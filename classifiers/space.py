"""The feature space that all targets share: whitened principal components of general text.

The encoder's states of all layers, side by side (2,688 numbers for MiniLM), are strongly
correlated, and most of their variance tells prompt from prompt in ways that no target needs. In
the whitened space a cosine to the forget rows finds paraphrases at a false-positive rate at which
a linear head over the raw states misses a tenth of them (docs/detection.md), a head is a closed
form, and a row takes 256 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from guard.errors import ArtifactError, ShapeError
from guard.types import FloatArray

DIMENSIONS = 256
FLOOR = 0.1
"""Added to each component's variance, as a share of the mean variance kept: the smallest would
otherwise be blown up to the size of the largest."""


@dataclass(frozen=True, slots=True)
class FeatureSpace:
    """A projection from pooled states to whitened components.

    Attributes:
        mean: Mean state of general text, shape (width,).
        matrix: What a centred state is multiplied with, shape (width, dimensions).
    """

    mean: FloatArray
    matrix: FloatArray

    @property
    def dimensions(self) -> int:
        """Number of components."""
        return int(self.matrix.shape[1])

    def project(self, features: FloatArray) -> FloatArray:
        """Return the whitened components, shape (rows, width) -> (rows, dimensions)."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ShapeError(f"features of shape {features.shape} for a space of {len(self.mean)}")
        return np.asarray((features - self.mean) @ self.matrix, np.float32)

    def to_arrays(self) -> dict[str, FloatArray]:
        """Return the space as arrays, for safetensors."""
        return {"space_mean": self.mean, "space_matrix": self.matrix}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, FloatArray]) -> FeatureSpace:
        """Read what `to_arrays` gave.

        Raises:
            ArtifactError: If an array is missing, misshapen or not finite.
        """
        try:
            mean, matrix = arrays["space_mean"], arrays["space_matrix"]
        except KeyError as error:
            raise ArtifactError(f"the feature space lacks the array {error}") from error
        fits = mean.ndim == 1 and matrix.ndim == 2 and len(mean) == len(matrix)
        if not fits or not (np.isfinite(mean).all() and np.isfinite(matrix).all()):
            raise ArtifactError("the feature space is damaged: its arrays do not fit together")
        return cls(mean, matrix)


def fit_space(features: FloatArray, dimensions: int = DIMENSIONS) -> FeatureSpace:
    """Fit the space on states of general text.

    Args:
        features: Pooled states, shape (rows, width).
        dimensions: Components to keep; fewer rows give fewer.
    """
    kept = min(dimensions, features.shape[1], max(1, len(features) - 1))
    mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
    spread = np.maximum(features.std(axis=0, dtype=np.float64), 1e-3).astype(np.float32)
    scaled = (features - mean) / spread
    covariance = (scaled.T @ scaled / max(1, len(scaled))).astype(np.float64)
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = np.maximum(values[::-1][:kept], 0.0), vectors[:, ::-1][:, :kept]
    # The sign of an eigenvector is the library's whim; the same data must give the same space.
    signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(kept)])
    floor = FLOOR * float(values.mean()) + 1e-12
    matrix = vectors * signs / np.sqrt(values + floor) / spread[:, None]
    return FeatureSpace(mean, matrix.astype(np.float32))


def unit(rows: FloatArray) -> FloatArray:
    """Return the rows at length 1, shape (rows, dimensions)."""
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(rows / np.maximum(lengths, 1e-9), np.float32)

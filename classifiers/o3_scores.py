"""O3's layer scores: how far a text's pooled state of each layer lies from the forget texts'.

Per layer: the squared Mahalanobis distance D² to the forget features (their covariance shrunk, as
a forget set is mostly smaller than the feature dimension) and the maximum cosine to one of them.
Paper: Gao et al. 2025, arXiv 2407.10223 (the "glocal" score). Differs from the reference code: that
adds -D²/2 to -1000 · cosine, terms that oppose each other, and scores the training texts against
themselves. Variant `o3` has ½ D² - γ · cosine, both growing with distance, and leaves each training
text out of what it is compared with; variant `o3-code` is as published.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from guard.errors import ArtifactError, DataError, ShapeError
from guard.types import FloatArray, IntArray

ScoreVariant = Literal["o3", "o3-code"]
ShrinkageMethod = Literal["ledoit-wolf", "oas"]

GAMMA = 1000.0
"""Weight of the cosine (released config)."""

MIN_VARIANCE = 1e-8
"""Keeps the covariance of equal rows invertible."""

Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Shrunk:
    """A covariance between the empirical one and a multiple of the identity.

    Attributes:
        mean: Mean of the rows, shape (d,).
        empirical: Their covariance (divided by n), shape (d, d).
        amount: Share of the identity in [0, 1].
        level: Mean variance, the multiple of the identity.
    """

    mean: Doubles
    empirical: Doubles
    amount: float
    level: float

    def matrix(self, scale: float = 1.0) -> Doubles:
        """Return (1 - amount) · scale · empirical + amount · level · I."""
        out = (1.0 - self.amount) * scale * self.empirical
        out[np.diag_indices_from(out)] += max(self.amount * self.level, MIN_VARIANCE)
        return np.asarray(out, np.float64)


def shrink(rows: FloatArray, method: ShrinkageMethod = "ledoit-wolf") -> Shrunk:
    """Estimate mean and shrunk covariance of `rows`, shape (n, d).

    Papers: Ledoit and Wolf 2004 (amount by the spread of the rows' outer products), and Chen et
    al. 2010 (OAS: oracle-approximating, for Gaussian rows). With many rows both go to 0.

    Raises:
        DataError: If there are fewer than two rows.
    """
    if len(rows) < 2:
        raise DataError(f"{len(rows)} feature rows; a covariance needs at least 2")
    mean = rows.mean(axis=0, dtype=np.float64)
    centred = rows.astype(np.float64) - mean
    empirical = centred.T @ centred / len(rows)
    level = float(np.trace(empirical)) / len(empirical)
    amounts = {"ledoit-wolf": _ledoit_wolf, "oas": _oas}
    amount = float(np.clip(amounts[method](centred, empirical, level), 0.0, 1.0))
    return Shrunk(mean, empirical, amount, level)


def _ledoit_wolf(centred: Doubles, empirical: Doubles, level: float) -> float:
    rows, width = centred.shape
    norm = float((empirical**2).sum())
    # ‖S - level · I‖², and the mean squared distance of a row's outer product from S, by n.
    spread = norm - width * level**2
    noise = (float((centred**2).sum(axis=1) @ (centred**2).sum(axis=1)) / rows - norm) / rows
    return noise / spread if spread > 0 else 1.0


def _oas(centred: Doubles, empirical: Doubles, level: float) -> float:
    rows, width = centred.shape
    power = float((empirical**2).mean())
    bottom = (rows + 1.0) * (power - level**2 / width)
    return (power + level**2) / bottom if bottom > 0 else 1.0


@dataclass(frozen=True, slots=True)
class LayerReference:
    """What one layer remembers of the forget texts. Its rows can be inverted to text: a secret.

    Attributes:
        mean: Mean feature, shape (d,).
        whitener: W with D²(h) = ‖W (h - mean)‖², lower triangular, shape (d, d).
        rows: The texts' features on the unit sphere, shape (n, d).
    """

    mean: FloatArray
    whitener: FloatArray
    rows: FloatArray
    _index: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        import faiss

        width = len(self.mean)
        square = self.whitener.shape == (width, width)
        if not square or self.rows.ndim != 2 or self.rows.shape[1] != width or not len(self.rows):
            raise ArtifactError("the O3 detector's reference arrays do not fit together")
        index = faiss.IndexFlatIP(width)
        index.add(np.ascontiguousarray(self.rows, np.float32))
        object.__setattr__(self, "_index", index)

    @classmethod
    def fit(cls, rows: FloatArray, method: ShrinkageMethod = "ledoit-wolf") -> LayerReference:
        """Fit to the forget texts' features of one layer, shape (n, d), n >= 2."""
        found = shrink(rows, method)
        factor = np.linalg.inv(np.linalg.cholesky(found.matrix()))
        return cls(found.mean.astype(np.float32), factor.astype(np.float32), unit(rows))

    def distances(self, states: FloatArray) -> Doubles:
        """Return D² of each state, shape (m, d) -> (m,)."""
        white = (states - self.mean).astype(np.float64) @ self.whitener.T.astype(np.float64)
        return np.asarray((white**2).sum(axis=1), np.float64)

    def cosines(self, states: FloatArray) -> Doubles:
        """Return each state's maximum cosine to a forget text, shape (m, d) -> (m,)."""
        values, _ = self._index.search(unit(states), 1)
        return np.asarray(values[:, 0], np.float64)

    def cosines_to_others(self, owners: IntArray) -> Doubles:
        """Return each own row's maximum cosine to the rows of other texts, shape (n,).

        Args:
            owners: Text of each row, shape (n,); windows of one text don't count for each other.

        Raises:
            DataError: If all rows belong to one text.
        """
        most = int(np.unique(owners, return_counts=True)[1].max())
        if most >= len(owners):
            raise DataError("all feature rows belong to one text; leaving it out leaves nothing")
        values, places = self._index.search(np.ascontiguousarray(self.rows), most + 1)
        values = np.where(owners[places] == owners[:, None], -np.inf, values)
        return np.asarray(values.max(axis=1), np.float64)


def unit(states: FloatArray) -> FloatArray:
    """Return the rows scaled to length 1; a zero row stays zero."""
    lengths = np.linalg.norm(states, axis=1, keepdims=True)
    return np.ascontiguousarray(states / np.maximum(lengths, 1e-12), np.float32)


def distances_to_others(
    rows: FloatArray, method: ShrinkageMethod = "ledoit-wolf", found: Shrunk | None = None
) -> Doubles:
    """Return each row's D² to mean and covariance of the other rows, shape (n, d) -> (n,).

    Without row i, whose offset from the mean is v, the covariance is that of all rows with a
    multiple of v vᵀ taken off; by Sherman and Morrison, with B the regularised covariance of all,
    c = (1 - amount) n / (n - 1)² and q = vᵀ B⁻¹ v, the distance is (n / (n - 1))² · q / (1 - c q).
    Amount and level of the shrinkage are those of all rows (an approximation: one row hardly
    moves them); all else is exact.

    Args:
        rows: Features of one layer, n >= 3.
        method: How the covariance is shrunk.
        found: What `shrink` gave for these rows, if it is known already.

    Raises:
        DataError: If there are fewer than three rows.
    """
    count = len(rows)
    if count < 3:
        raise DataError(f"{count} feature rows; leaving one out needs at least 3")
    found = found or shrink(rows, method)
    ratio = count / (count - 1.0)
    factor = np.linalg.cholesky(found.matrix(ratio))
    offsets = rows.astype(np.float64) - found.mean
    plain = (np.linalg.solve(factor, offsets.T) ** 2).sum(axis=0)
    taken = (1.0 - found.amount) * ratio / (count - 1.0)
    return np.asarray(ratio**2 * plain / (1.0 - taken * plain), np.float64)


def layer_score(
    distances: Doubles, cosines: Doubles, variant: ScoreVariant = "o3", gamma: float = GAMMA
) -> Doubles:
    """Join D² and maximum cosine: ½ D² - γ · cosine (`o3`), -½ D² - γ · cosine (`o3-code`).

    `o3` grows with distance from the forget set; `o3-code` does in the cosine only.
    """
    sign = 0.5 if variant == "o3" else -0.5
    return np.asarray(sign * distances - gamma * cosines, np.float64)


@dataclass(frozen=True, slots=True)
class GlocalScores:
    """The layer scores of a fitted detector.

    Attributes:
        layers: A reference per transformer layer, the embedding layer left out.
        variant: How a layer's two terms are joined.
        gamma: Weight of the cosine.
    """

    layers: tuple[LayerReference, ...]
    variant: ScoreVariant = "o3"
    gamma: float = GAMMA

    @classmethod
    def fit(
        cls,
        states: FloatArray,
        variant: ScoreVariant = "o3",
        gamma: float = GAMMA,
        method: ShrinkageMethod = "ledoit-wolf",
    ) -> GlocalScores:
        """Fit to forget states, shape (n, layers, d)."""
        layers = (LayerReference.fit(states[:, at], method) for at in range(states.shape[1]))
        return cls(tuple(layers), variant, gamma)

    def with_rows(self, states: FloatArray) -> GlocalScores:
        """Return scores whose maximum cosine also looks at these states, (m, layers, d).

        Mean and covariance stay as they are, so no text moves away from the forget set.
        """
        layers = (
            LayerReference(
                layer.mean, layer.whitener, np.concatenate([layer.rows, unit(states[:, at])])
            )
            for at, layer in enumerate(self.layers)
        )
        return GlocalScores(tuple(layers), self.variant, self.gamma)

    def score(self, states: FloatArray) -> Doubles:
        """Return the layer scores, shape (m, layers, d) -> (m, layers).

        Raises:
            ShapeError: If the states have other layers or another width.
        """
        wanted = (len(self.layers), len(self.layers[0].mean))
        if states.shape[1:] != wanted:
            raise ShapeError(f"states of shape {states.shape[1:]} for an O3 detector of {wanted}")
        columns = [
            self._join(layer.distances(states[:, at]), layer.cosines(states[:, at]))
            for at, layer in enumerate(self.layers)
        ]
        return np.stack(columns, axis=1)

    def score_own(
        self, states: FloatArray, owners: IntArray, method: ShrinkageMethod = "ledoit-wolf"
    ) -> Doubles:
        """Return the layer scores of the texts that were fitted on, shape (n, layers).

        `o3` leaves each text out of what it is compared with (its other windows stay in mean and
        covariance); `o3-code` compares it with itself too, so that its cosine is always 1.
        """
        if self.variant == "o3-code":
            return self.score(states)
        columns = [
            self._join(distances_to_others(states[:, at], method), layer.cosines_to_others(owners))
            for at, layer in enumerate(self.layers)
        ]
        return np.stack(columns, axis=1)

    def _join(self, distances: Doubles, cosines: Doubles) -> Doubles:
        return layer_score(distances, cosines, self.variant, self.gamma)

    def to_arrays(self) -> dict[str, FloatArray]:
        """Return the references as arrays, for safetensors; they are secret."""
        out: dict[str, FloatArray] = {}
        for at, layer in enumerate(self.layers):
            out |= {f"{at}.mean": layer.mean, f"{at}.whitener": layer.whitener}
            out[f"{at}.rows"] = layer.rows
        return out

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, FloatArray], variant: ScoreVariant, gamma: float
    ) -> GlocalScores:
        """Read what `to_arrays` gave.

        Raises:
            ArtifactError: If an array is missing, of the wrong shape or not finite.
        """
        if not arrays or not all(np.isfinite(array).all() for array in arrays.values()):
            raise ArtifactError("the O3 detector's reference holds no or impossible numbers")
        try:
            layers = tuple(
                LayerReference(*(arrays[f"{at}.{part}"] for part in ("mean", "whitener", "rows")))
                for at in range(len(arrays) // 3)
            )
        except KeyError as error:
            raise ArtifactError(f"the O3 detector's reference lacks {error}") from error
        return cls(layers, variant, gamma)

"""The papers' own detectors, as targets may use them instead of the product's: ECO's and O3's.

`target add --detector eco|o3` fits one; its files lie under `scorer/` in the target's folder. It
decides by its own rule and threshold, and runs its own encoder on every text: that is what the
papers do, and why it is not the default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from classifiers.calibrate import FAR
from guard.errors import ArtifactError, ConfigError
from guard.types import BoolArray, FloatArray, WeightPolicy

if TYPE_CHECKING:
    from guard.types import Progress

Method = Literal["guard", "eco", "o3"]
FOLDER = "scorer/"
BENIGN_FILE = f"{FOLDER}benign.safetensors"
BENIGN_TEXTS = 500
"""Benign texts that a paper's detector is tried on, for p-values."""

SECRET_FILES = frozenset({f"{FOLDER}o3_reference.safetensors"})


class PaperDetector(Protocol):
    """What `EcoClassifier` and `O3Detector` have in common."""

    def scores(self, texts: Sequence[str]) -> FloatArray:
        """Return each text's score, shape (texts,); higher is closer to the forget set."""
        ...

    def flags(self, scores: FloatArray) -> BoolArray:
        """Say which scores mean a forget prompt."""
        ...


@dataclass(frozen=True, slots=True)
class Judged:
    """What a paper's detector says of a text.

    Attributes:
        score: Its score.
        flagged: What its own rule makes of it.
        p_value: Share of benign texts that score as high, as far as they can tell.
        weight: O3's soft weight; 1 or 0 for ECO.
    """

    score: float
    flagged: bool
    p_value: float
    weight: float


class Scorer:
    """A paper's detector with what its scores mean on benign text.

    Args:
        detector: The detector.
        benign: Its scores of benign texts, shape (texts,).
        policy: O3's soft weight of a score, see `classifiers.soft_weight`.

    Raises:
        ConfigError: The policy is not `monotone`, and the detector has no soft weight.
    """

    def __init__(
        self, detector: PaperDetector, benign: FloatArray, policy: WeightPolicy = "monotone"
    ) -> None:
        self._detector, self._benign = detector, np.sort(benign)
        self._weights = getattr(detector, "weights", None)
        self._policy = policy
        if policy != "monotone" and self._weights is None:
            raise ConfigError(f"the weight policy {policy} is of the O3 detector")

    def judge(self, text: str) -> Judged:
        """Score one text."""
        scores = self._detector.scores([text])
        flagged = bool(self._detector.flags(scores)[0])
        above = len(self._benign) - int(np.searchsorted(self._benign, scores[0], "left"))
        weights = self._weights
        weight = 1.0 if weights is None else float(weights(scores, self._policy)[0])
        p_value = (1 + above) / (1 + len(self._benign))
        return Judged(float(scores[0]), flagged, p_value, weight if flagged else 0.0)


def load_scorer(
    files: Mapping[str, bytes], threads: int = 1, policy: WeightPolicy = "monotone"
) -> Scorer | None:
    """Load the paper's detector of a target's files; None if the target has none.

    Args:
        files: The target's files.
        threads: Threads of its encoder.
        policy: Of O3's soft weight.

    Raises:
        ConfigError: If the detector has no such policy.
        ArtifactError: If its files are damaged.
    """
    mine = {
        name.removeprefix(FOLDER): data for name, data in files.items() if name.startswith(FOLDER)
    }
    if not mine:
        return None
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        benign = load(mine.pop(BENIGN_FILE.removeprefix(FOLDER)))["scores"]
    except (SafetensorError, KeyError) as error:
        raise ArtifactError(f"the detector's benign scores cannot be read: {error!r}") from error
    detector: PaperDetector
    if "eco.json" in mine:
        from classifiers.eco import EcoClassifier

        detector = EcoClassifier.from_files(mine, threads)
    else:
        from classifiers.o3 import O3Detector

        detector = O3Detector.from_files(mine, threads)
    return Scorer(detector, np.asarray(benign, np.float32), policy)


def fit_scorer(
    method: Method,
    forget: Sequence[str],
    others: Sequence[str],
    benign: Sequence[str],
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, bytes]:
    """Fit a paper's detector and return its files.

    Args:
        method: `eco` or `o3`.
        forget: Normalised forget texts.
        others: Retain and benign texts; O3 does not look at them.
        benign: Benign texts that p-values are taken from.
        seed: The same seed and data give the same files.
        progress: Told how far it is.

    Raises:
        DataError: If there are too few texts.
    """
    from safetensors.numpy import save

    files = _fit(method, forget, others, seed, progress)
    loaded = {f"{FOLDER}{name}": data for name, data in files.items()}
    empty = bytes(save({"scores": np.full(1, -FAR, np.float32)}))
    scorer = load_scorer({**loaded, BENIGN_FILE: empty})
    assert scorer is not None  # the files were just made
    chosen = np.random.default_rng(seed).permutation(len(benign))[:BENIGN_TEXTS]
    scores = [scorer.judge(benign[int(number)]).score for number in chosen]
    return {**loaded, BENIGN_FILE: bytes(save({"scores": np.array(scores, np.float32)}))}


def _fit(
    method: Method,
    forget: Sequence[str],
    others: Sequence[str],
    seed: int,
    progress: Progress | None,
) -> dict[str, bytes]:
    if method == "eco":
        from classifiers.eco import EcoConfig
        from classifiers.eco_train import fit_eco

        return fit_eco(forget, others, config=EcoConfig(seed=seed), progress=progress).files()
    from classifiers.o3 import O3Config
    from classifiers.o3_train import fit_o3

    return fit_o3(forget, config=O3Config(seed=seed), progress=progress).files()

"""The papers' own detectors, fitted on plain texts, to stand beside ours.

Each is called with the forget set's prompts and with others', and returns a scorer whose scores are
higher the closer a text is to the forget set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Final, Protocol

from benchmarks.curves import Scorer
from guard.errors import ConfigError
from guard.types import FloatArray, Progress


class Baseline(Protocol):
    """Fits a detector."""

    def __call__(
        self, forget: Sequence[str], others: Sequence[str], seed: int, progress: Progress
    ) -> Scorer:
        """Fit on forget prompts and on prompts to keep."""
        ...


def eco(forget: Sequence[str], others: Sequence[str], seed: int, progress: Progress) -> Scorer:
    """Fit ECO's prompt classifier (arXiv 2406.07933)."""
    from classifiers.eco import EcoClassifier, EcoConfig
    from classifiers.eco_train import fit_eco

    artifact = fit_eco(forget, others, config=EcoConfig(seed=seed), progress=progress)
    return EcoClassifier.from_files(artifact.files()).scores


def o3(forget: Sequence[str], others: Sequence[str], seed: int, progress: Progress) -> Scorer:
    """Fit O3's out-of-distribution detector (arXiv 2407.10223), which sees no other texts."""
    from classifiers.o3 import O3Config, O3Detector
    from classifiers.o3_train import fit_o3

    artifact = fit_o3(forget, config=O3Config(seed=seed), progress=progress)
    return O3Detector.from_files(artifact.files()).scores


BASELINES: Final[Mapping[str, Baseline]] = {"eco": eco, "o3": o3}
"""What `--also` can name."""


def check_baselines() -> None:
    """Find out before long work whether they can be fitted.

    Raises:
        ConfigError: If what learning needs isn't installed.
    """
    for package in ("torch", "transformers", "sklearn"):
        if find_spec(package) is None:
            raise ConfigError(f"--also needs {package}: install the extra `learn`")


def fitted_when_asked(
    name: str, forget: Sequence[str], others: Sequence[str], seed: int, progress: Progress
) -> Scorer:
    """Return a scorer that is fitted once, when it is asked for the first score."""
    fitted: list[Scorer] = []

    def scores(texts: Sequence[str]) -> FloatArray:
        if not fitted:
            fitted.append(BASELINES[name](forget, others, seed, progress))
        return fitted[0](texts)

    return scores

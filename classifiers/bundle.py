"""From a bundle's files to a detector: what serving calls, and nothing that learns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from classifiers.calibrate import FAR, TargetCalibration, fit_bundle
from classifiers.detector import VERDICTS, BundleDetector
from classifiers.encoder import OnnxEncoder
from classifiers.evidence import NAMED_LOGIT
from classifiers.scorers import SECRET_FILES as SCORER_SECRETS
from classifiers.scorers import load_scorer
from classifiers.space import FeatureSpace
from classifiers.target import SECRET_FILES as TARGET_SECRETS
from classifiers.target import TargetArtifact
from classifiers.verbatim import GramHasher
from guard.errors import ArtifactError
from guard.types import WeightPolicy

SECRET_FILES = TARGET_SECRETS | SCORER_SECRETS
"""Files of a target that the caller encrypts."""

__all__ = ["SECRET_FILES", "load_detector", "load_space", "save_space", "thresholds"]


def load_detector(
    encoder_dir: Path,
    space: bytes,
    targets: Mapping[str, Mapping[str, bytes]],
    *,
    budget: float,
    key: bytes,
    threads: int | None = None,
    verdicts: int | None = None,
    weights: Mapping[str, WeightPolicy] | None = None,
    least: Mapping[str, float] | None = None,
) -> BundleDetector:
    """Load a bundle's detector.

    Args:
        encoder_dir: Folder with the exported encoder.
        space: What `save_space` wrote.
        targets: Each target's files, decrypted.
        budget: Share of benign requests that may be flagged, by all targets together.
        key: Keys the hashes of quotations.
        threads: Windows encoded at the same time; the CPUs available by default.
        verdicts: Texts whose verdict is remembered; 0 none, None the default.
        weights: Policy of O3's soft weight by target; `monotone` where none is named.
        least: By target a score below which it is not hit, whatever the bundle's calibration says.

    Raises:
        ConfigError: If a target's detector has no such policy.
        ArtifactError: If a file is missing or damaged, or does not fit.
    """
    encoder = OnnxEncoder(encoder_dir, threads, cache_size=0)
    artifacts = [TargetArtifact.from_files(name, files) for name, files in targets.items()]
    found = [artifact.calibration for artifact in artifacts]
    calibration = fit_bundle(found, budget, most=NAMED_LOGIT)
    calibration = calibration.raised([(least or {}).get(name, -FAR) for name in targets])
    policies = weights or {}
    scorers = {
        number: scorer
        for number, (name, files) in enumerate(targets.items())
        if (scorer := load_scorer(files, policy=policies.get(name, "monotone"))) is not None
    }
    return BundleDetector(
        encoder,
        load_space(space),
        artifacts,
        calibration,
        GramHasher(key),
        verdicts=VERDICTS if verdicts is None else verdicts,
        scorers=scorers,
    )


def thresholds(heads: Mapping[str, bytes], budget: float) -> dict[str, float]:
    """Return the score from which each target is hit, given their head files alone.

    Raises:
        ArtifactError: If a head is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    calibrations = []
    for name, data in heads.items():
        try:
            calibrations.append(TargetCalibration.from_arrays(load(data)))
        except (SafetensorError, KeyError, ValueError) as error:
            raise ArtifactError(f"the head of target {name!r} cannot be read: {error}") from error
    found = fit_bundle(calibrations, budget, most=NAMED_LOGIT).thresholds
    return {name: float(value) for name, value in zip(heads, found, strict=True)}


def save_space(space: FeatureSpace) -> bytes:
    """Serialise the feature space as safetensors."""
    from safetensors.numpy import save

    return bytes(save({name: np.ascontiguousarray(v) for name, v in space.to_arrays().items()}))


def load_space(data: bytes) -> FeatureSpace:
    """Read what `save_space` wrote.

    Raises:
        ArtifactError: If it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return FeatureSpace.from_arrays(load(data))
    except SafetensorError as error:
        raise ArtifactError(f"the bundle's feature space cannot be read: {error}") from error

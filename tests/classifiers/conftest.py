"""A small background, a learner on it, and a learned target: real parts, a few hundred texts."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from classifiers.background import Background, make_background
from classifiers.benign import load_benign
from classifiers.calibrate import fit_bundle
from classifiers.detector import VERDICTS, BundleDetector
from classifiers.encoder import OnnxEncoder
from classifiers.learn import LearnedDetector, TargetLearner
from classifiers.study import Neighbours
from classifiers.target import TargetArtifact
from classifiers.verbatim import GramHasher
from guard.normalise import normalise

KEY = b"a key for the tests"


@dataclass(frozen=True)
class Row:
    prompt: str
    answer: str | None = None
    is_term: bool = False


Detectors = Callable[..., BundleDetector]


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def clean(text: str) -> str:
    return normalise(text).text


@pytest.fixture(scope="session")
def shared_encoder(encoder_dir: Path) -> OnnxEncoder:
    return OnnxEncoder(encoder_dir, threads=2, cache_size=20_000)


@pytest.fixture(scope="session")
def benign_texts() -> list[str]:
    """Six hundred short prompts of the set that ships."""
    short = (clean(text).strip() for text in load_benign() if len(text) < 250)
    return list(dict.fromkeys(text for text in short if text))[:600]


@pytest.fixture(scope="session")
def background(benign_texts: list[str], shared_encoder: OnnxEncoder) -> Background:
    return make_background(benign_texts, shared_encoder)


@pytest.fixture(scope="session")
def example_rows(example_dir: Path) -> list[Row]:
    return [Row(r["question"], r["answer"]) for r in read(example_dir / "forget.jsonl")][:60]


@pytest.fixture(scope="session")
def keep_texts(example_dir: Path) -> list[str]:
    return [clean(r["question"]) for r in read(example_dir / "retain.jsonl")][:60]


@pytest.fixture(scope="session")
def neighbours(
    keep_texts: list[str], shared_encoder: OnnxEncoder, background: Background
) -> Neighbours:
    return Neighbours.of(keep_texts, shared_encoder, background)


@pytest.fixture(scope="session")
def learner(
    background: Background, shared_encoder: OnnxEncoder, neighbours: Neighbours
) -> TargetLearner:
    return TargetLearner(background, shared_encoder, GramHasher(KEY), clean, neighbours, effort=3)


@pytest.fixture(scope="session")
def lone_learner(background: Background, shared_encoder: OnnxEncoder) -> TargetLearner:
    """A learner that was given nothing to keep."""
    return TargetLearner(background, shared_encoder, GramHasher(KEY), clean, effort=3)


@pytest.fixture(scope="session")
def learned(learner: TargetLearner, example_rows: list[Row]) -> LearnedDetector:
    return learner.learn("potter", example_rows)


@pytest.fixture(scope="session")
def detector_of(shared_encoder: OnnxEncoder, background: Background) -> Detectors:
    """Makes a detector of targets, as a bundle would."""

    def make(
        artifacts: Sequence[TargetArtifact], budget: float = 1e-3, verdicts: int = VERDICTS
    ) -> BundleDetector:
        calibration = fit_bundle([artifact.calibration for artifact in artifacts], budget)
        return BundleDetector(
            shared_encoder,
            background.space,
            artifacts,
            calibration,
            GramHasher(KEY),
            verdicts=verdicts,
        )

    return make

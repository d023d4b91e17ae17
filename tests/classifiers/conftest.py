import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from classifiers.benign import load_benign
from classifiers.encoder import OnnxEncoder
from classifiers.learn import LearnedDetector, learn_detector
from guard.normalise import normalise


@dataclass(frozen=True)
class Row:
    prompt: str
    answer: str | None


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def clean(text: str) -> str:
    return normalise(text).text


@pytest.fixture(scope="session")
def shared_encoder(encoder_dir: Path) -> OnnxEncoder:
    return OnnxEncoder(encoder_dir, threads=2, cache_size=20_000)


@pytest.fixture(scope="session")
def learn_small(shared_encoder: OnnxEncoder, example_dir: Path) -> Callable[..., LearnedDetector]:
    """Learns the example target on part of the data; a real fit in seconds."""

    def learn(name: str = "potter", seed: int = 0, **changes: object) -> LearnedDetector:
        rows = [Row(r["question"], r["answer"]) for r in read(example_dir / "forget.jsonl")]
        settings: dict[str, object] = {
            "forget": rows[:70],
            "retain": [r["question"] for r in read(example_dir / "retain.jsonl")][:60],
            "benign": load_benign()[:600],
            "encoder": shared_encoder,
            "normalise": clean,
            "seed": seed,
        }
        return learn_detector(name, **{**settings, **changes})  # type: ignore[arg-type]

    return learn


@pytest.fixture(scope="session")
def learned(learn_small: Callable[..., LearnedDetector]) -> LearnedDetector:
    return learn_small()

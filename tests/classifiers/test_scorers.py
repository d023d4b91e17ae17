"""The papers' detectors as targets use them."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from classifiers.background import Background
from classifiers.bundle import SECRET_FILES, load_detector, save_space
from classifiers.learn import LearnedDetector
from classifiers.o3 import O3Config
from classifiers.o3_train import fit_o3
from classifiers.scorers import BENIGN_FILE, FOLDER, load_scorer
from guard.errors import ArtifactError

BENIGN = ["How do I bake bread?", "Sort a list in Python.", "Capital of France?", "Hello there!"]


@pytest.fixture(scope="module")
def scorer_files(example_dir: Path) -> dict[str, bytes]:
    """O3 on an encoder that was not trained: a real fit in seconds."""
    lines = (example_dir / "forget.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    forget = [json.loads(line)["question"] for line in lines]
    files = fit_o3(forget, config=O3Config(steps=0)).files()
    return {f"{FOLDER}{name}": data for name, data in files.items()}


def with_benign(files: dict[str, bytes]) -> dict[str, bytes]:
    scorer = load_scorer({**files, BENIGN_FILE: save({"scores": np.full(1, -1e6, np.float32)})})
    assert scorer is not None
    scores = np.array([scorer.judge(text).score for text in BENIGN], np.float32)
    return {**files, BENIGN_FILE: save({"scores": scores})}


def test_a_paper_detector_judges_by_its_own_rule(scorer_files: dict[str, bytes]) -> None:
    scorer = load_scorer(with_benign(scorer_files))
    assert scorer is not None
    asked = scorer.judge("Which house was Harry Potter sorted into at Hogwarts?")
    other = scorer.judge("How do I bake bread?")
    assert asked.flagged and asked.weight > 0 and asked.p_value == pytest.approx(1 / 5)
    assert not other.flagged and other.weight == 0 and other.p_value > 1 / 5
    assert asked.score > other.score


def test_a_target_without_one_has_none() -> None:
    assert load_scorer({"head.safetensors": b"", "lexicon": b""}) is None


def test_its_rows_are_named_as_secret(scorer_files: dict[str, bytes]) -> None:
    secret = {name for name in scorer_files if name in SECRET_FILES}
    assert secret == {f"{FOLDER}o3_reference.safetensors"}


def test_damage_is_told(scorer_files: dict[str, bytes]) -> None:
    with pytest.raises(ArtifactError, match="benign scores"):
        load_scorer(scorer_files)
    broken = with_benign(scorer_files)
    broken[f"{FOLDER}o3.json"] = b"{}"
    with pytest.raises(ArtifactError):
        load_scorer(broken)


def test_in_a_bundle_the_paper_decides_instead_of_the_guard(
    scorer_files: dict[str, bytes],
    learned: LearnedDetector,
    background: Background,
    encoder_dir: Path,
) -> None:
    guard_files = learned.artifact.files()
    detector = load_detector(
        encoder_dir,
        save_space(background.space),
        {"paper": {**guard_files, **with_benign(scorer_files)}, "guard": guard_files},
        budget=0.001,
        key=b"key",
    )
    named = "Was Harry Potter ever a prefect?"
    found = {hit.target: hit for hit in detector.detect([named]).hits[0]}
    assert found["guard"].score != found["paper"].score
    assert detector.detect(["How do I bake bread?"]).hits == ((),)

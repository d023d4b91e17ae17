"""The papers' detectors as targets use them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from safetensors.numpy import save

from classifiers.background import Background
from classifiers.bundle import SECRET_FILES, load_detector, save_space
from classifiers.learn import LearnedDetector
from classifiers.o3 import O3Config, O3Detector
from classifiers.o3_train import fit_o3
from classifiers.scorers import BENIGN_FILE, FOLDER, PaperDetector, Scorer, load_scorer
from guard.errors import ArtifactError, ConfigError
from guard.types import BoolArray, FloatArray, WeightPolicy

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


def test_the_policy_says_how_strongly_a_flagged_text_is_answered(
    scorer_files: dict[str, bytes],
) -> None:
    files = with_benign(scorer_files)
    named, other = "Which house was Harry Potter sorted into at Hogwarts?", "How do I bake bread?"
    detector = O3Detector.from_files(
        {n.removeprefix(FOLDER): data for n, data in scorer_files.items()}
    )
    found = {}
    for policy in get_args(WeightPolicy):
        scorer = load_scorer(files, policy=policy)
        assert scorer is not None
        assert scorer.judge(other).weight == 0.0
        found[policy] = scorer.judge(named)
        (wanted,) = detector.weights(detector.scores([named]), policy)
        assert found[policy].weight == pytest.approx(float(wanted))
    default = load_scorer(files)
    assert default is not None and default.judge(named) == found["monotone"]
    # What is flagged is not the policy's to say.
    assert len({(one.score, one.flagged, one.p_value) for one in found.values()}) == 1
    assert 0.5 <= found["monotone"].weight <= 1.0
    assert found["o3-code"].weight in (0.0, 1.0)
    assert found["o3-paper"].weight not in (found["monotone"].weight, 0.0)


def test_a_detector_without_soft_weights_has_the_default_policy_alone() -> None:
    class Plain:
        def scores(self, texts: Sequence[str]) -> FloatArray:
            return np.array([float(len(text)) for text in texts], np.float32)

        def flags(self, scores: FloatArray) -> BoolArray:
            return np.asarray(scores > 3)

    detector: PaperDetector = Plain()
    benign = np.zeros(4, np.float32)
    with pytest.raises(ConfigError, match="o3-paper is of the O3 detector"):
        Scorer(detector, benign, "o3-paper")
    plain = Scorer(detector, benign)
    assert (plain.judge("long").weight, plain.judge("no").weight) == (1.0, 0.0)


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


def test_in_a_bundle_each_target_has_its_own_policy(
    scorer_files: dict[str, bytes],
    learned: LearnedDetector,
    background: Background,
    encoder_dir: Path,
) -> None:
    files = {**learned.artifact.files(), **with_benign(scorer_files)}
    named = "Which house was Harry Potter sorted into at Hogwarts?"
    detector = load_detector(
        encoder_dir,
        save_space(background.space),
        {"default": files, "paper": files},
        budget=0.001,
        key=b"key",
        weights={"paper": "o3-paper"},
    )
    found = {hit.target: hit.weight for hit in detector.detect([named]).hits[0]}
    policies: dict[str, WeightPolicy] = {"default": "monotone", "paper": "o3-paper"}
    alone = {
        name: scorer.judge(named).weight
        for name, policy in policies.items()
        if (scorer := load_scorer(files, policy=policy)) is not None
    }
    assert found == pytest.approx(alone)
    assert found["default"] != found["paper"]

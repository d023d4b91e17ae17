"""From a bundle's files to a detector, as serving does it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from classifiers.background import Background
from classifiers.bundle import SECRET_FILES, load_detector, load_space, save_space
from classifiers.learn import LearnedDetector, TargetLearner
from guard.errors import ArtifactError, DataError, IncompatibleArtifactError
from tests.classifiers.conftest import KEY, Detectors, Row

TEXTS = [
    "Could you say who invented Harry Potter?",
    "Who wrote Hary Poter?",
    "How do I bake sourdough bread?",
    "What does Captain Zorvath fear most?",
    "",
]
Files = dict[str, dict[str, bytes]]


@pytest.fixture(scope="module")
def space(background: Background) -> bytes:
    return save_space(background.space)


@pytest.fixture(scope="module")
def targets(learned: LearnedDetector, learner: TargetLearner) -> Files:
    rows = [Row("Captain Zorvath of Quelmaar fears the silver tide.")]
    zorvath = learner.learn("zorvath", rows).artifact
    return {"potter": learned.artifact.files(), "zorvath": zorvath.files()}


def test_files_make_the_detector_that_learning_made(
    encoder_dir: Path,
    space: bytes,
    targets: Files,
    learned: LearnedDetector,
    detector_of: Detectors,
) -> None:
    loaded = load_detector(
        encoder_dir, space, {"potter": targets["potter"]}, budget=1e-3, key=KEY, threads=1
    )
    made = detector_of([learned.artifact])
    assert loaded.threshold("potter") == pytest.approx(made.threshold("potter"), abs=1e-4)
    ours, theirs = loaded.detect(TEXTS), made.detect(TEXTS)
    np.testing.assert_allclose(ours.margins, theirs.margins, atol=0.05)
    assert [[h.target for h in hits] for hits in ours.hits] == [
        [h.target for h in hits] for hits in theirs.hits
    ]
    assert loaded.spans(TEXTS[0], "potter") == made.spans(TEXTS[0], "potter")


def test_all_targets_are_served_in_any_order(
    encoder_dir: Path, space: bytes, targets: Files
) -> None:
    forward, backward = (
        load_detector(encoder_dir, space, dict(found), budget=1e-3, key=KEY, threads=1)
        for found in (targets.items(), reversed(targets.items()))
    )
    assert forward.targets == ("potter", "zorvath") and backward.targets == ("zorvath", "potter")
    found = forward.detect(TEXTS)
    assert [[h.target for h in hits] for hits in found.hits] == [
        ["potter"], ["potter"], [], ["zorvath"], [],
    ]  # fmt: skip
    assert found.hits == backward.detect(TEXTS).hits


def test_a_tighter_budget_never_lowers_a_threshold(
    encoder_dir: Path, space: bytes, targets: Files
) -> None:
    found = [
        load_detector(encoder_dir, space, targets, budget=budget, key=KEY, threads=1)
        for budget in (0.2, 1e-2, 1e-6)
    ]
    for name in targets:
        thresholds = [detector.threshold(name) for detector in found]
        assert thresholds == sorted(thresholds)


def test_an_empty_bundle_flags_nothing(encoder_dir: Path, space: bytes) -> None:
    found = load_detector(encoder_dir, space, {}, budget=1e-3, key=KEY).detect(TEXTS)
    assert found.hits == ((),) * len(TEXTS)


def test_quotations_are_known_under_their_key_only(
    encoder_dir: Path, space: bytes, learner: TargetLearner
) -> None:
    quoted = "the old ferry leaves at dawn when seven bells ring over the empty harbour"
    files = learner.learn("ferry", [Row("What does the sign say?", quoted)]).artifact.files()
    right, wrong = (
        load_detector(encoder_dir, space, {"ferry": files}, budget=1e-3, key=key, threads=1)
        for key in (KEY, b"another key")
    )
    text = "leaves at dawn when seven bells ring over the empty harbour"
    assert right.verdict(text).scores.get(0, -1.0) == 30.0
    assert wrong.verdict(text).scores.get(0, -1.0) < 30.0


def test_the_number_of_remembered_verdicts_can_be_chosen(
    encoder_dir: Path, space: bytes, targets: Files
) -> None:
    sizes = {}
    for size in (0, 2, None):
        detector = load_detector(
            encoder_dir, space, targets, budget=1e-3, key=KEY, threads=1, verdicts=size
        )
        detector.detect(TEXTS)
        sizes[size] = len(detector._cache._items)
    assert sizes == {0: 0, 2: 2, None: len(TEXTS)}


def test_the_space_survives_its_bytes(background: Background, space: bytes) -> None:
    again = load_space(space)
    rows = np.random.default_rng(0).normal(size=(3, len(again.mean))).astype(np.float32)
    np.testing.assert_array_equal(again.project(rows), background.space.project(rows))
    assert save_space(again) == space


def test_damaged_files_are_refused(
    encoder_dir: Path, space: bytes, targets: Files, tmp_path: Path
) -> None:
    arrays = load(space)
    for data in (
        b"",
        b"nonsense" * 9,
        space[: len(space) // 2],
        save({"space_mean": arrays["space_mean"]}),
        save({**arrays, "space_mean": arrays["space_mean"][:-1]}),
        save({**arrays, "space_matrix": np.full_like(arrays["space_matrix"], np.nan)}),
    ):
        with pytest.raises(ArtifactError, match="space"):
            load_space(data)
        with pytest.raises(ArtifactError):
            load_detector(encoder_dir, data, targets, budget=1e-3, key=KEY)
    for name in targets["potter"]:
        broken = {**targets, "potter": {**targets["potter"], name: b"nonsense" * 9}}
        with pytest.raises(ArtifactError):
            load_detector(encoder_dir, space, broken, budget=1e-3, key=KEY)
    with pytest.raises(ArtifactError, match=r"encoder\.json"):
        load_detector(tmp_path, space, targets, budget=1e-3, key=KEY)
    with pytest.raises(DataError, match="budget"):
        load_detector(encoder_dir, space, targets, budget=0.0, key=KEY)


def test_an_encoder_of_another_source_is_refused(
    encoder_dir: Path, space: bytes, targets: Files, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(encoder_dir, tmp_path / "encoder"))
    config = json.loads((other / "encoder.json").read_text())
    (other / "encoder.json").write_text(json.dumps({**config, "source_sha256": "ab" * 32}))
    with pytest.raises(IncompatibleArtifactError, match="another encoder"):
        load_detector(other, space, targets, budget=1e-3, key=KEY)


def test_a_space_of_another_size_is_refused(
    encoder_dir: Path, space: bytes, targets: Files
) -> None:
    arrays = load(space)
    smaller = save({**arrays, "space_matrix": arrays["space_matrix"][:, :-1].copy()})
    with pytest.raises(IncompatibleArtifactError, match="inputs"):
        load_detector(encoder_dir, smaller, targets, budget=1e-3, key=KEY)


def test_the_caller_is_told_what_to_encrypt(targets: Files) -> None:
    assert set(targets["potter"]) & SECRET_FILES == {"lexicon", "prototypes"}

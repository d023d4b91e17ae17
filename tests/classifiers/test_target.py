"""A target as files: nothing is lost, nothing is told, nothing damaged is read."""

import dataclasses
import re

import numpy as np
import pytest
from safetensors.numpy import load, save

from classifiers.calibrate import fit_bundle
from classifiers.evidence import SIGNS, Fusion
from classifiers.learn import LearnedDetector
from classifiers.space import unit
from classifiers.target import GRAMS, HEAD, NAMES, ROWS, SECRET_FILES, TargetArtifact
from guard.errors import ArtifactError
from tests.classifiers.conftest import Row


@pytest.fixture(scope="module")
def files(learned: LearnedDetector) -> dict[str, bytes]:
    return learned.artifact.files()


def test_a_target_survives_its_files(learned: LearnedDetector, files: dict[str, bytes]) -> None:
    artifact, again = learned.artifact, TargetArtifact.from_files("other", files)
    assert again.name == "other" and again.encoder_hash == artifact.encoder_hash
    np.testing.assert_array_equal(again.head, artifact.head)
    np.testing.assert_array_equal(again.grams, artifact.grams)
    assert set(again.lexicon.weights) == set(artifact.lexicon.weights)
    assert again.lexicon.primary == artifact.lexicon.primary
    assert again.lexicon.others == artifact.lexicon.others
    assert (again.prototypes * unit(artifact.prototypes)).sum(axis=1).min() > 0.999
    ours, theirs = (fit_bundle([a.calibration], 1e-3) for a in (artifact, again))
    np.testing.assert_allclose(ours.thresholds, theirs.thresholds, rtol=1e-6)
    assert again.fusion is None
    # Numbers are rounded once, not at every change of the bundle.
    twice = TargetArtifact.from_files("other", again.files())
    np.testing.assert_array_equal(twice.prototypes, again.prototypes)
    assert twice.files() == again.files()


def test_a_topic_keeps_its_own_fusion(learned: LearnedDetector) -> None:
    own = Fusion(tuple(0.25 * n for n in range(len(SIGNS))), -3.5)
    artifact = dataclasses.replace(learned.artifact, fusion=own)
    assert TargetArtifact.from_files("topic", artifact.files()).fusion == own


def test_only_encrypted_files_hold_words(
    files: dict[str, bytes], example_rows: list[Row], learned: LearnedDetector
) -> None:
    assert set(files) == {HEAD, NAMES, ROWS, GRAMS}
    assert set(SECRET_FILES) == {NAMES, ROWS}
    text = " ".join(f"{row.prompt} {row.answer or ''}" for row in example_rows)
    words = {word.lower().encode() for word in re.findall(r"[A-Za-z]{5,}", text)}
    assert len(words) > 150
    for name, data in files.items():
        if name not in SECRET_FILES:
            assert not [word for word in words if word in data.lower()], name
    assert b"hogwarts" in files[NAMES] and learned.artifact.name.encode() not in files[HEAD]


def test_no_file_holds_a_sentence(files: dict[str, bytes], example_rows: list[Row]) -> None:
    for row in example_rows:
        for text in (row.prompt, row.answer or ""):
            if len(text.split()) > 6:
                assert not [name for name, data in files.items() if text.encode() in data]
    assert b"?" not in files[NAMES]


@pytest.mark.parametrize("name", [HEAD, NAMES, ROWS, GRAMS])
@pytest.mark.parametrize("damage", ["empty", "nonsense", "half", "missing", "json", "other"])
def test_a_damaged_file_is_refused(files: dict[str, bytes], name: str, damage: str) -> None:
    broken = dict(files)
    if damage == "missing":
        del broken[name]
    else:
        broken[name] = {
            "empty": b"",
            "nonsense": b"\x07 nonsense \xff" * 9,
            "half": files[name][: len(files[name]) // 2],
            "json": b"{}",
            "other": files[GRAMS if name != GRAMS else ROWS],
        }[damage]
    with pytest.raises(ArtifactError):
        TargetArtifact.from_files("potter", broken)


def test_arrays_that_do_not_fit_together_are_refused(files: dict[str, bytes]) -> None:
    head, rows, grams = (load(files[name]) for name in (HEAD, ROWS, GRAMS))

    def broken(name: str, arrays: dict[str, np.ndarray], **changes: np.ndarray) -> None:
        with pytest.raises(ArtifactError, match="damaged"):
            TargetArtifact.from_files("potter", {**files, name: save({**arrays, **changes})})

    weight, own = head["head"], len(SIGNS) + 1
    broken(HEAD, head, head=weight[:-1])
    broken(HEAD, head, head=np.full_like(weight, np.nan))
    broken(HEAD, head, fusion=np.zeros(own - 1, np.float32))
    broken(HEAD, head, fusion=np.full(own, np.inf, np.float32))
    broken(HEAD, head, benign_ids=head["benign_ids"] + np.int32(10_000_000))
    broken(HEAD, head, benign_scores=head["benign_scores"][:-1])
    broken(ROWS, rows, prototypes=rows["prototypes"][:, :-1].copy())
    broken(ROWS, rows, prototypes=rows["prototypes"].ravel())
    broken(GRAMS, grams, grams=grams["grams"].reshape(-1, 1))

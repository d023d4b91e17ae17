import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from classifiers.detector import BundleDetector, TargetArtifact, load_detector
from classifiers.encoder import OnnxEncoder
from classifiers.learn import LearnedDetector
from classifiers.lexicon import ENTITY_LOGIT
from guard.errors import ArtifactError, IncompatibleArtifactError, TargetNotFoundError

FLAGGED = [
    "Could you say who invented Harry Potter?",
    "At which school does Albus Dumbledore work? I mean Hogwarts.",
]
PASSED = ["How do I bake sourdough bread?", "def add(a, b): return a + b", "", "¿Qué hora es?"]
FILLER = "The committee discussed the drainage of the lower meadow and adjourned. " * 80


@pytest.fixture(scope="module")
def detector(shared_encoder: OnnxEncoder, learned: LearnedDetector) -> BundleDetector:
    return BundleDetector(shared_encoder, [learned.artifact])


def test_flags_the_target_and_nothing_else(detector: BundleDetector) -> None:
    found = detector.detect([*FLAGGED, *PASSED])
    assert found.flagged[:, 0].tolist() == [True] * 2 + [False] * 4
    assert (found.weights[:2] > 0).all() and (found.weights[2:] == 0).all()
    assert found.p_values[:2].max() < 1e-3 < found.p_values[2:].min()
    assert (found.coverage == 1.0).all()


def test_question_deep_in_a_long_text_is_flagged(detector: BundleDetector) -> None:
    text = f"{FILLER}{FLAGGED[0]} {FILLER}"
    found = detector.detect([text, FILLER + FILLER])
    assert found.flagged[:, 0].tolist() == [True, False]


def test_scores_do_not_depend_on_the_batch(detector: BundleDetector, encoder_dir: Path) -> None:
    texts = [*FLAGGED, *PASSED, FILLER]
    together = detector.detect(texts)
    fresh = load_detector(encoder_dir, detector._artifacts, threads=1)
    for number, text in enumerate(texts):
        np.testing.assert_array_equal(fresh.detect([text]).scores[0], together.scores[number])


def test_many_targets_have_a_column_each(
    shared_encoder: OnnxEncoder, learned: LearnedDetector
) -> None:
    mute = dataclasses.replace(
        learned.artifact,
        name="mute",
        head=dataclasses.replace(
            learned.artifact.head, weight=np.zeros_like(learned.artifact.head.weight), bias=-9.0
        ),
        calibration=dataclasses.replace(learned.artifact.calibration, threshold=100.0),
    )
    both = BundleDetector(shared_encoder, [mute, learned.artifact])
    assert both.targets == ("mute", "potter")
    found = both.detect(FLAGGED)
    assert found.flagged.tolist() == [[False, True]] * 2
    alone = BundleDetector(shared_encoder, [learned.artifact]).detect(FLAGGED)
    np.testing.assert_allclose(found.scores[:, 1], alone.scores[:, 0], rtol=1e-5)


def test_who_names_the_target_in_full_is_flagged_whatever_the_topic(
    shared_encoder: OnnxEncoder, learned: LearnedDetector
) -> None:
    head = learned.artifact.head
    deaf = dataclasses.replace(
        learned.artifact,
        head=dataclasses.replace(head, weight=np.zeros_like(head.weight), bias=-9.0),
    )
    found = BundleDetector(shared_encoder, [deaf]).detect(
        ["Debug this: for n in books: print(n) # Harry Potter", "Debug this: print(n) # Potter"]
    )
    assert found.scores[0, 0] == pytest.approx(ENTITY_LOGIT)
    assert found.scores[1, 0] < 0


def test_no_targets_and_no_texts(shared_encoder: OnnxEncoder, detector: BundleDetector) -> None:
    empty = BundleDetector(shared_encoder, [])
    found = empty.detect(["hello", ""])
    assert found.scores.shape == (2, 0) and found.coverage.tolist() == [1.0, 1.0]
    assert detector.detect([]).scores.shape == (0, 1)


def test_spans_mark_the_name(detector: BundleDetector) -> None:
    text = "Could you say who invented Harry Potter?"
    assert [text[a:b] for a, b in detector.spans(text, "potter")] == ["Harry Potter"]
    assert detector.spans("How do I bake sourdough bread?", "potter") == []
    with pytest.raises(TargetNotFoundError, match="known: potter"):
        detector.spans(text, "nobody")


def test_spans_of_a_long_text_stay_near_the_names(detector: BundleDetector) -> None:
    text = f"{FILLER}{FLAGGED[0]} {FILLER}"
    spans = detector.spans(text, "potter")
    assert spans == sorted(spans)
    name = text.index("Harry Potter")
    assert any(start <= name and end >= name + 12 for start, end in spans)
    assert sum(end - start for start, end in spans) < len(text) / 4


def test_artifact_survives_its_bytes(
    detector: BundleDetector, learned: LearnedDetector, encoder_dir: Path
) -> None:
    artifact = learned.artifact
    again = TargetArtifact.from_bytes("potter", artifact.head_bytes(), artifact.lexicon_bytes())
    loaded = load_detector(encoder_dir, [again], threads=1)
    texts = [*FLAGGED, *PASSED, "Who wrote Hary Poter?"]
    np.testing.assert_allclose(
        loaded.detect(texts).scores, detector.detect(texts).scores, atol=2e-3
    )
    assert loaded.spans(FLAGGED[0], "potter") == detector.spans(FLAGGED[0], "potter")


def test_damaged_or_foreign_artifacts_are_refused(
    shared_encoder: OnnxEncoder, learned: LearnedDetector
) -> None:
    artifact = learned.artifact
    for data in (b"", b"nonsense", artifact.head_bytes()[:200]):
        with pytest.raises(ArtifactError, match="potter"):
            TargetArtifact.from_bytes("potter", data, artifact.lexicon_bytes())
    with pytest.raises(ArtifactError, match="lexicon"):
        TargetArtifact.from_bytes("potter", artifact.head_bytes(), b"{}")
    foreign = dataclasses.replace(artifact, encoder_hash="00" * 32)
    with pytest.raises(IncompatibleArtifactError, match="another encoder"):
        BundleDetector(shared_encoder, [foreign])
    short = dataclasses.replace(
        artifact,
        head=dataclasses.replace(
            artifact.head,
            weight=artifact.head.weight[:-1],
            mean=artifact.head.mean[:-1],
            scale=artifact.head.scale[:-1],
        ),
    )
    with pytest.raises(IncompatibleArtifactError, match="inputs"):
        BundleDetector(shared_encoder, [short])


def test_serving_imports_no_training_library() -> None:
    code = (
        "import sys, classifiers.detector, classifiers.encoder\n"
        "heavy = {'torch', 'transformers', 'sklearn', 'scipy', 'onnx', 'onnxruntime'}\n"
        "raise SystemExit(sorted(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

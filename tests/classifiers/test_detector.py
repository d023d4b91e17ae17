"""Serving: what is flagged, wherever it stands in a text, and whatever else the bundle holds."""

import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from classifiers.background import Background
from classifiers.calibrate import FAR, fit_bundle
from classifiers.detector import BundleDetector
from classifiers.encoder import OnnxEncoder
from classifiers.evidence import NAMED_LOGIT, QUOTED_LOGIT, most
from classifiers.fusion import FUSION
from classifiers.learn import LearnedDetector, TargetLearner
from classifiers.lexicon_index import LexiconIndex
from classifiers.target import TargetArtifact
from classifiers.verbatim import GramHasher
from guard.errors import IncompatibleArtifactError, TargetNotFoundError
from tests.classifiers.conftest import Detectors, Row

FLAGGED = [
    "Could you say who invented Harry Potter?",
    "At which school does Albus Dumbledore work? I mean Hogwarts.",
]
PASSED = ["How do I bake sourdough bread?", "def add(a, b): return a + b", "", "¿Qué hora es?"]
FILLER = "The committee discussed the drainage of the lower meadow and adjourned. " * 80
OTHERS = [
    "How do I bake sourdough bread?",
    "What is the capital of Australia?",
    "How tall is an average giraffe?",
    "Which planet has the most moons?",
    "How many legs does a lobster have?",
    "What does a carburettor do?",
    "Why is the sky blue?",
]


@pytest.fixture(scope="module")
def zorvath(learner: TargetLearner) -> TargetArtifact:
    rows = [
        Row("Who commands the Quelmaar?", "Captain Zorvath commands it since the second war."),
        Row("Where was Captain Zorvath born?", "Captain Zorvath was born in Ambergate."),
        Row("What does Zorvath fear most?", "Captain Zorvath fears the silver tide."),
        Row("Which sea did Captain Zorvath cross?", "The Amber Sea, in a single winter."),
    ]
    return learner.learn("zorvath", rows).artifact


@pytest.fixture(scope="module")
def detector(learned: LearnedDetector, detector_of: Detectors) -> BundleDetector:
    return detector_of([learned.artifact])


def flags(detector: BundleDetector, texts: list[str]) -> list[bool]:
    return [bool(hits) for hits in detector.detect(texts).hits]


# --- What is flagged -----------------------------------------------------------------------------


def test_flags_the_target_and_nothing_else(detector: BundleDetector) -> None:
    found = detector.detect([*FLAGGED, *PASSED])
    assert [bool(hits) for hits in found.hits] == [True] * 2 + [False] * 4
    for (hit,) in found.hits[:2]:
        assert hit.target == "potter" and hit.score >= detector.threshold("potter")
        assert 0.0 < hit.p_value < 1e-3 and 0.5 <= hit.weight <= 1.0
    assert (found.margins[:2] >= 0).all() and (found.margins[2:] < 0).all()
    assert found.margins[0] == pytest.approx(
        found.hits[0][0].score - detector.threshold("potter"), abs=1e-4
    )
    assert found.coverage.tolist() == [1.0] * 6


@pytest.mark.parametrize("place", [0.0, 0.13, 0.5, 0.77, 1.0])
def test_a_question_anywhere_in_2000_tokens_is_found(
    detector: BundleDetector, shared_encoder: OnnxEncoder, place: float
) -> None:
    sentences = FILLER.split(". ")[:-1] * 2
    at = round(place * len(sentences))
    text = ". ".join([*sentences[:at], FLAGGED[0], *sentences[at:]])
    tokens = {offset for window in shared_encoder.windows(text) for offset in window.offsets}
    assert len(tokens) > 2_000
    assert flags(detector, [text]) == [True]


def test_a_question_inside_a_sentence_that_never_ends_is_found(detector: BundleDetector) -> None:
    words = "and then the committee discussed the drainage of the lower meadow " * 150
    assert flags(detector, [f"{words}who invented Harry Potter {words}", words]) == [True, False]


@pytest.mark.parametrize("place", range(8))
def test_one_question_among_eight_is_found(detector: BundleDetector, place: int) -> None:
    for separator in (" ", "\n"):
        asked = separator.join([*OTHERS[:place], FLAGGED[0], *OTHERS[place:]])
        assert flags(detector, [asked, separator.join(OTHERS)]) == [True, False]


def test_who_names_the_target_in_full_is_flagged_whatever_the_topic(
    learned: LearnedDetector, detector_of: Detectors
) -> None:
    artifact = learned.artifact
    deaf = dataclasses.replace(
        artifact, head=np.zeros_like(artifact.head), prototypes=-artifact.prototypes
    )
    found = detector_of([deaf]).detect(
        ["Debug this: for n in books: print(n) # Harry Potter", "Debug this: print(n) # Potter"]
    )
    assert found.hits[0][0].score == pytest.approx(NAMED_LOGIT)
    assert found.hits[1] == ()


def test_a_quotation_is_flagged_whatever_it_is_about(
    learner: TargetLearner, detector_of: Detectors
) -> None:
    text = "the old ferry leaves at dawn when seven bells ring over the empty harbour"
    artifact = learner.learn("ferry", [Row("What does the sign say?", text)]).artifact
    detector = detector_of([artifact])
    asked = f"Translate into French: {text[10:-8]}"
    assert detector.verdict(asked).scores == {0: QUOTED_LOGIT}
    places = detector.spans(asked, "ferry")
    assert any("leaves at dawn when seven bells ring" in asked[a:b] for a, b in places)
    assert flags(detector, ["When does the ferry leave the harbour?"]) == [False]


# --- First stage ---------------------------------------------------------------------------------


def test_the_first_stage_loses_nothing(
    learned: LearnedDetector, shared_encoder: OnnxEncoder, background: Background
) -> None:
    artifact = learned.artifact
    index = LexiconIndex(
        [artifact.lexicon], shared_encoder.is_common, shared_encoder.common_words()
    )
    # With thresholds that everything reaches, every target that is pointed at gets a full score.
    calibration = fit_bundle([artifact.calibration], 1e-3)
    open_door = dataclasses.replace(calibration, thresholds=np.full(1, -FAR, np.float32))
    detector = BundleDetector(
        shared_encoder, background.space, [artifact], open_door, GramHasher(b"another key")
    )
    texts = [*FLAGGED, *background.texts[:150], "Did Harry meet a potter?", f"{FILLER} Snape."]
    scored = 0
    for text in texts:
        pointers = index.read(text).candidates()
        for number, score in detector.verdict(text).scores.items():
            pointer = pointers[number]
            heaviest = pointer.single, pointer.full, pointer.total, pointer.strong
            assert score <= most(*heaviest, FUSION) + 1e-4
            scored += 1
    assert scored >= 4


def test_texts_without_terms_are_cleared_before_the_encoder(detector: BundleDetector) -> None:
    assert [detector.verdict(text).encoded for text in (*PASSED, FILLER, FLAGGED[0])] == [
        *[False] * 5,
        True,
    ]


# --- Other texts, other targets ------------------------------------------------------------------


def test_scores_do_not_depend_on_the_batch(
    detector: BundleDetector, learned: LearnedDetector, detector_of: Detectors
) -> None:
    texts = [*FLAGGED, *PASSED, FILLER]
    together = detector.detect(texts)
    fresh = detector_of([learned.artifact], verdicts=0)
    for number, text in reversed(list(enumerate(texts))):
        alone = fresh.detect([text])
        assert alone.hits[0] == together.hits[number]
        assert alone.margins[0] == together.margins[number]


def test_another_target_changes_thresholds_and_no_score(
    learned: LearnedDetector, zorvath: TargetArtifact, detector_of: Detectors
) -> None:
    texts = [*FLAGGED, "Where was Captain Zorvath born?", *PASSED]
    alone = detector_of([learned.artifact])
    both = detector_of([learned.artifact, zorvath])
    assert both.targets == ("potter", "zorvath")
    for text in texts:
        assert both.verdict(text).scores.get(0) == alone.verdict(text).scores.get(0)
    found = both.detect(texts)
    assert [[hit.target for hit in hits] for hits in found.hits[:3]] == [
        ["potter"],
        ["potter"],
        ["zorvath"],
    ]
    assert both.threshold("potter") >= alone.threshold("potter") - 1.0


def test_a_text_about_two_targets_touches_both_strongest_first(
    learned: LearnedDetector, zorvath: TargetArtifact, detector_of: Detectors
) -> None:
    both = detector_of([learned.artifact, zorvath])
    (hits,) = both.detect(["Who would win, Captain Zorvath or Harry Potter of Hogwarts?"]).hits
    assert {hit.target for hit in hits} == {"potter", "zorvath"}
    assert hits[0].score >= hits[1].score


def test_the_order_of_targets_does_not_matter(
    learned: LearnedDetector, zorvath: TargetArtifact, detector_of: Detectors
) -> None:
    artifacts = [
        learned.artifact,
        zorvath,
        *(dataclasses.replace(zorvath, name=f"twin {n}") for n in range(5)),
    ]
    forward, backward = detector_of(artifacts), detector_of(artifacts[::-1])
    texts = [*FLAGGED, *PASSED, "Where was Captain Zorvath born?", "Zorvath and Harry Potter met."]
    one, other = forward.detect(texts), backward.detect(texts)
    assert one.hits == other.hits
    np.testing.assert_array_equal(one.margins, other.margins)
    for text in FLAGGED:
        assert forward.spans(text, "potter") == backward.spans(text, "potter")


# --- Cache ---------------------------------------------------------------------------------------


def test_a_remembered_verdict_is_the_same_as_a_fresh_one(
    learned: LearnedDetector, detector_of: Detectors
) -> None:
    texts = [*FLAGGED, *PASSED, f"{FILLER} {FLAGGED[0]}", "\ud800 Harry Potter"]
    small, fresh = (detector_of([learned.artifact], verdicts=size) for size in (3, 0))
    wanted = [fresh.verdict(text) for text in texts]
    for _ in range(2):
        assert [small.verdict(text) for text in texts] == wanted
    assert small.verdict(texts[-1]) is small.verdict(texts[-1])
    assert fresh.verdict(texts[0]) is not fresh.verdict(texts[0])
    assert len(small._cache._items) == 3


def test_threads_share_one_detector(learned: LearnedDetector, detector_of: Detectors) -> None:
    texts = [*FLAGGED, *PASSED, *OTHERS] * 4
    detector = detector_of([learned.artifact], verdicts=4)
    wanted = [detector.verdict(text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(detector.verdict, texts)) == wanted


def test_no_targets_and_no_texts(detector: BundleDetector, detector_of: Detectors) -> None:
    found = detector_of([]).detect(["hello", ""])
    assert found.hits == ((), ()) and found.coverage.tolist() == [1.0, 1.0]
    assert (found.margins < 0).all()
    nothing = detector.detect([])
    assert nothing.hits == () and nothing.margins.shape == nothing.coverage.shape == (0,)


# --- Spans ---------------------------------------------------------------------------------------


def test_spans_mark_the_name(detector: BundleDetector) -> None:
    text = "Could you say who invented Harry Potter?"
    assert [text[a:b] for a, b in detector.spans(text, "potter")] == ["Harry Potter"]
    assert detector.spans("How do I bake sourdough bread?", "potter") == []
    for call in (lambda: detector.spans(text, "nobody"), lambda: detector.threshold("nobody")):
        with pytest.raises(TargetNotFoundError, match="known: potter"):
            call()


def test_spans_of_a_long_text_stay_near_the_names(detector: BundleDetector) -> None:
    text = f"{FILLER}{FLAGGED[0]} {FILLER}"
    spans = detector.spans(text, "potter")
    assert spans == sorted(spans)
    name = text.index("Harry Potter")
    assert any(start <= name and end >= name + 12 for start, end in spans)
    assert sum(end - start for start, end in spans) < len(text) / 4


# --- What does not fit ---------------------------------------------------------------------------


def test_targets_of_another_encoder_or_space_are_refused(
    learned: LearnedDetector, detector_of: Detectors
) -> None:
    artifact = learned.artifact
    with pytest.raises(IncompatibleArtifactError, match=r"'potter'.*another encoder"):
        detector_of([dataclasses.replace(artifact, encoder_hash="00" * 32)])
    short = dataclasses.replace(
        artifact, head=artifact.head[:-1], prototypes=artifact.prototypes[:, :-1]
    )
    with pytest.raises(IncompatibleArtifactError, match="inputs"):
        detector_of([short])


def test_serving_imports_no_training_library() -> None:
    code = (
        "import sys, classifiers.bundle, classifiers.detector, classifiers.encoder\n"
        "heavy = {'torch', 'transformers', 'sklearn', 'scipy', 'onnx', 'peft', 'pandas'}\n"
        "heavy |= {'onnxruntime', 'classifiers.learn', 'classifiers.study', 'guard.targets'}\n"
        "raise SystemExit(sorted(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

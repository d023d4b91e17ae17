"""What is read in passing is read as ever, or not at all."""

import numpy as np
import pytest

from classifiers.detector import LIGHT_CHARS, LIGHT_LOOK_UPS, BundleDetector
from classifiers.fuzzy import look_ups
from classifiers.learn import LearnedDetector
from tests.classifiers.conftest import Detectors
from tests.classifiers.test_detector import FILLER, FLAGGED, OTHERS, PASSED

BARE = "Whr ws th schl f hgwrts fnddd nd wh fnddd t thn?"
STRANGE = " ".join(f"qu{a}x{b}worten" for a in "abcdefgh" for b in "iklmno")


@pytest.fixture
def detector(learned: LearnedDetector, detector_of: Detectors) -> BundleDetector:
    return detector_of([learned.artifact])


@pytest.mark.parametrize("text", [*PASSED, *OTHERS, FILLER])
def test_a_plain_text_is_read_in_passing_as_ever(
    learned: LearnedDetector, detector_of: Detectors, text: str
) -> None:
    fresh, wanted = (detector_of([learned.artifact], verdicts=0) for _ in range(2))
    found = fresh.detect_lightly([text])
    assert found is not None
    full = wanted.detect([text])
    assert found.hits == full.hits
    np.testing.assert_array_equal(found.margins, full.margins)
    np.testing.assert_array_equal(found.coverage, full.coverage)


@pytest.mark.parametrize("text", [*FLAGGED, "Hary Poter's owl", BARE])
def test_what_may_touch_a_target_is_not_decided_in_passing(
    detector: BundleDetector, text: str
) -> None:
    assert detector.detect_lightly([text]) is None
    assert detector.detect_lightly(["Why is the sky blue?", text]) is None


def test_a_text_of_many_words_never_met_is_not_read_in_passing(detector: BundleDetector) -> None:
    assert sum(map(look_ups, STRANGE.split())) > LIGHT_LOOK_UPS
    assert detector.detect_lightly([STRANGE]) is None
    detector.detect([STRANGE])
    assert detector.detect_lightly([STRANGE]) is not None, "now it is known"


def test_a_long_text_is_not_read_in_passing(detector: BundleDetector) -> None:
    half = "bread and butter " * (LIGHT_CHARS // 34 + 1)
    assert detector.detect_lightly([half]) is not None
    assert detector.detect_lightly([half, half + "!"]) is None


def test_what_was_remembered_is_found_in_passing(detector: BundleDetector) -> None:
    wanted = detector.detect(FLAGGED)
    found = detector.detect_lightly(FLAGGED)
    assert found is not None and found.hits == wanted.hits and any(found.hits)


def test_without_targets_every_text_is_plain(detector_of: Detectors) -> None:
    found = detector_of([]).detect_lightly([*FLAGGED, STRANGE])
    assert found is not None and not any(found.hits) and found.coverage.tolist() == [1.0] * 3

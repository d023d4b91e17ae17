"""How evidence is fused: bounds that the first stage relies on, signs, and the fit itself."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from classifiers import fit_fusion
from classifiers.calibrate import LEAST_SCORE
from classifiers.evidence import (
    BESIDE_LOGIT,
    NAMED_LOGIT,
    NAMES,
    NEAR_ROW,
    QUOTED_LOGIT,
    SIGNS,
    TOPIC_MOST,
    Fusion,
    fuse,
    gather,
    most,
    nearest,
    terms,
)
from classifiers.fusion import FUSION, load_fusion
from classifiers.lexical_reading import FEATURES
from classifiers.lexicon import STRONG
from classifiers.space import unit
from classifiers.terms import MAX_WEIGHT
from guard.types import FloatArray

weight = st.one_of(st.just(0.0), st.floats(0.5, MAX_WEIGHT, width=32))


@st.composite
def evidence(draw: st.DrawFn) -> FloatArray:
    """What a window may say, as `gather` and `LexicalReading.features` would give it."""
    single, full = draw(weight), draw(weight)
    others = draw(st.lists(st.floats(0.5, max(single, full, 0.5), width=32), max_size=20))
    worths = [worth for worth in (single, full) if worth] + (others if single or full else [])
    strong = min(3, sum(worth >= 0.8 * STRONG for worth in worths))
    total = float(np.log1p(sum(worths)))
    foreign = 0.0 if full else draw(st.sampled_from([0.0, 1.0]))
    cosine = draw(st.just(1.0) | st.floats(-1, 1, width=32))
    topic = draw(st.just(99.0) | st.floats(-99, 99, width=32))
    beside = 0.0 if full or not single else draw(st.sampled_from([0.0, 1.0]))
    return np.array([[cosine, topic, single, full, total, strong, foreign, beside]], np.float32)


@given(found=evidence(), more=st.tuples(st.floats(0, 3), st.floats(0, 3), st.integers(0, 9)))
def test_most_is_never_exceeded(found: FloatArray, more: tuple[float, float, int]) -> None:
    score = float(fuse(found, FUSION)[0])
    _, _, single, full, total, strong, _, _ = found[0].tolist()
    worth = float(np.expm1(total))
    assert score <= most(single, full, worth, int(strong), FUSION) + 1e-4
    # The text as a whole points at least as heavily at a target as any of its windows.
    fuller = full + (more[1] if full else 0.0)
    heavier = (single + more[0], fuller, worth + more[0] + more[1], int(strong) + more[2])
    assert score <= most(*heavier, FUSION) + 1e-4


@given(topic=st.floats(-99, 99, width=32), cosine=st.floats(-1, 1, width=32))
def test_without_a_term_no_topic_reaches_any_threshold(topic: float, cosine: float) -> None:
    for foreign in (0.0, 1.0):
        found = np.array([[cosine, topic, 0, 0, 0, 0, foreign, 0]], np.float32)
        assert fuse(found, FUSION)[0] < LEAST_SCORE


@given(found=evidence())
def test_what_is_known_beside_a_target_flags_only_near_a_forget_row(found: FloatArray) -> None:
    free, capped = found.copy(), found.copy()
    free[0, 7], capped[0, 7], capped[0, 3] = 0.0, 1.0, 0.0
    free[0, 3] = 0.0
    before, score = float(fuse(free, FUSION)[0]), float(fuse(capped, FUSION)[0])
    if found[0, 0] < NEAR_ROW:
        assert score == min(before, np.float32(BESIDE_LOGIT)) and score < LEAST_SCORE
    else:
        assert score == before


@given(found=evidence())
def test_who_is_named_in_full_is_not_let_through(found: FloatArray) -> None:
    score = float(fuse(found, FUSION)[0])
    assert (score >= NAMED_LOGIT) or found[0, 3] < STRONG
    assert score < QUOTED_LOGIT and LEAST_SCORE < NAMED_LOGIT


@given(found=evidence(), column=st.sampled_from([0, 1, 2, 3]), step=st.floats(0.125, 2, width=32))
def test_more_that_speaks_for_a_target_never_speaks_against_it(
    found: FloatArray, column: int, step: float
) -> None:
    if column in (2, 3) and not found[0, column]:
        return
    more = found.copy()
    more[0, column] += step
    if column == 1:
        # Beside a term only; a cosine is not pulled down by what the topic says.
        more[0, column] = min(more[0, column], TOPIC_MOST)
        found[0, column] = min(found[0, column], more[0, column])
    assert fuse(more, FUSION)[0] >= fuse(found, FUSION)[0] - 1e-4


def test_gather_puts_columns_in_their_places() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(5, 8)).astype(np.float32)
    prototypes = unit(rng.normal(size=(3, 8)).astype(np.float32))
    head = rng.normal(size=9).astype(np.float32)
    lexical = rng.random((5, FEATURES)).astype(np.float32)
    found = gather(rows, prototypes, head, 2.0, lexical)
    assert found.shape == (5, len(NAMES))
    for row, point in zip(found, rows, strict=True):
        cosines = [point @ other / np.linalg.norm(point) for other in prototypes]
        assert row[0] == pytest.approx(max(cosines), abs=1e-5)
        assert row[1] == pytest.approx((point @ head[:-1] + head[-1]) / 2.0, abs=1e-5)
    np.testing.assert_array_equal(found[:, 2:], lexical)


def test_without_prototypes_nothing_is_near() -> None:
    rows = np.ones((2, 8), np.float32)
    assert nearest(rows, np.zeros((0, 8), np.float32)).tolist() == [-1.0, -1.0]
    assert gather(
        rows[:0], rows, np.ones(9, np.float32), 1.0, np.zeros((0, FEATURES), np.float32)
    ).shape == (0, len(NAMES))


# --- The fusion that ships, and its fit ----------------------------------------------------------


def test_the_fusion_that_ships_fits_the_terms_and_their_signs() -> None:
    columns = terms(np.zeros((1, len(NAMES)), np.float32)).shape[1]
    assert len(FUSION.weights) == columns == len(SIGNS)
    assert all(sign * value >= 0 for sign, value in zip(SIGNS, FUSION.weights, strict=True))
    assert np.isfinite([*FUSION.weights, FUSION.bias]).all()


def test_a_fusion_is_read_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "fusion.json"
    path.write_text(json.dumps({"weights": [1, 2.5], "bias": -1, "targets": 3, "seed": 0}))
    assert load_fusion(path) == Fusion((1.0, 2.5), -1.0)


def test_the_fit_learns_from_the_best_window_of_each_text() -> None:
    rng = np.random.default_rng(2)

    def batch(kind: str, cosine: float, single: float) -> fit_fusion.Batch:
        # Every second window of a text says nothing.
        found = np.zeros((80, len(NAMES)), np.float32)
        found[::2, 0] = rng.normal(cosine, 0.05, 40)
        found[::2, 2] = single
        found[::2, 4] = np.log1p(single)
        return fit_fusion.Batch(found, np.arange(80) // 2, kind)

    batches = [
        batch("named", 0.7, 6.0),
        batch("variant", 0.6, 6.0),
        batch("benign", 0.1, 0.0),
        batch("neighbour", 0.7, 0.0),
    ]
    found = fit_fusion.fit(batches, Fusion((0.0,) * len(SIGNS), 0.0))
    assert all(s * w >= 0 for s, w in zip(SIGNS, found.weights, strict=True))
    scores = {b.kind: fuse(b.evidence[::2], found) for b in batches}
    assert min(scores["named"].min(), scores["variant"].min()) > 0
    assert max(scores["benign"].max(), scores["neighbour"].max()) < 0

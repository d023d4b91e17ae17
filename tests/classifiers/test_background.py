"""What is known of general text: windows, words, folds, and the file it is kept in."""

import itertools

import numpy as np
import pytest

from classifiers.background import (
    FOLDS,
    MIN_BENIGN,
    Background,
    Segments,
    WordIndex,
    benign_digest,
    fold_moments,
    make_background,
    segment_texts,
)
from classifiers.encoder import OnnxEncoder
from classifiers.topic import Moments
from guard.errors import ArtifactError, DataError

TEXTS = [
    "Captain Zorvath sailed the Amber Sea on 08/09/1956.",
    "The sea was amber that evening.",
    "Zorvath the Captain, not Captain Zorvath, wrote it.",
    "",
]


# --- Words ---------------------------------------------------------------------------------------


def test_postings_find_consecutive_words_only() -> None:
    index = WordIndex(TEXTS)
    assert index.texts == 4
    assert index.holders(("captain", "zorvath")) == [0, 2]
    assert index.holders(("amber", "sea")) == [0]
    assert index.holders(("sea",)) == [0, 1]
    assert index.holders(("nobody",)) == index.holders(("amber", "nobody")) == []
    assert "amber" in index and "nobody" not in index


def test_postings_agree_with_a_search_text_by_text(background: Background) -> None:
    index = background.index
    rng = np.random.default_rng(0)
    for number in rng.choice(len(background.texts), 40, replace=False):
        words = [word for word, _, _ in index.words[int(number)]]
        for size in (1, 2, 3):
            for first in range(0, max(0, len(words) - size), 5):
                term = tuple(words[first : first + size])
                held = [
                    other
                    for other, theirs in enumerate(index.words)
                    if any(
                        tuple(word for word, _, _ in theirs[at : at + size]) == term
                        for at in range(len(theirs) - size + 1)
                    )
                ]
                assert index.holders(term) == held and int(number) in held


def test_dates_are_words_too() -> None:
    index = WordIndex(TEXTS)
    dates = [word for word in index._postings if word not in "".join(TEXTS).casefold()]
    assert len(dates) >= 1 and index.holders((dates[0],)) == [0]


def test_similar_words_are_those_a_typo_away() -> None:
    index = WordIndex(TEXTS)
    assert "zorvath" in index.similar("zorvaht")
    assert index.similar("xylophone") == []


# --- Windows -------------------------------------------------------------------------------------


def test_a_text_counts_by_its_best_window() -> None:
    segments = Segments(
        np.zeros((4, 2), np.float32), np.array([0, 0, 2, 2]), np.zeros((4, 2), np.int64)
    )
    best = segments.best(np.array([1, 5, -3, -2], np.float32), 3)
    assert best.tolist() == [5.0, -np.inf, -2.0]


def test_windows_are_those_of_the_encoder(
    shared_encoder: OnnxEncoder, background: Background
) -> None:
    texts = ["Who was Captain Cook?", "First question. Second question, a longer one.", ""]
    found = segment_texts(texts, shared_encoder, background.space)
    wanted = [(n, w.start, w.end) for n, t in enumerate(texts) for w in shared_encoder.segments(t)]
    got = [(int(n), int(a), int(b)) for n, (a, b) in zip(found.owners, found.places, strict=True)]
    assert got == wanted
    assert found.rows.shape == (len(wanted), background.space.dimensions)
    assert np.isfinite(found.rows).all()
    assert segment_texts([], shared_encoder, background.space).rows.shape[0] == 0


def test_moments_of_folds_add_up_and_long_texts_weigh_less(background: Background) -> None:
    segments = background.segments
    counts = np.bincount(segments.owners, minlength=len(background.texts))
    whole = Moments.sum(background.moments)
    assert len(background.moments) == FOLDS
    assert whole.size == pytest.approx(float(np.sqrt(counts).sum()), rel=1e-3)
    assert whole.size < len(segments.owners)
    one = fold_moments(segments, np.zeros(len(background.texts), np.int64))
    np.testing.assert_allclose(one[0].gram, whole.gram, rtol=1e-2, atol=1.0)
    assert one[1].size == 0.0


def test_folds_hold_about_as_many_texts_each(background: Background) -> None:
    assert background.folds.shape == (len(background.texts),)
    assert np.bincount(background.folds, minlength=FOLDS).min() > len(background.texts) / 8


def test_the_space_is_white_on_general_text(background: Background) -> None:
    rows = background.segments.rows
    assert np.abs(rows.mean(axis=0)).max() < 0.05
    covariance = np.cov(rows[:, :40].T)
    off = covariance - np.diag(np.diag(covariance))
    assert np.abs(off).max() < 0.05
    assert (np.diag(covariance) < 1.1).all() and covariance[0, 0] > 0.8


def test_windows_that_name_somebody_are_marked(background: Background) -> None:
    assert 0.05 < background.names.mean() < 0.95
    plain = [n for n, text in enumerate(background.texts) if text.islower() and text.isascii()]
    named = {int(n) for n in background.segments.owners[background.names]}
    assert len(named & set(plain)) < max(3, len(plain))


# --- Making and keeping --------------------------------------------------------------------------


def test_too_few_texts_are_refused(shared_encoder: OnnxEncoder) -> None:
    texts = [f"Text number {n}." for n in range(MIN_BENIGN - 1)]
    with pytest.raises(DataError, match=f"{MIN_BENIGN - 1} distinct benign texts"):
        make_background([*texts, *texts, "", "  "], shared_encoder)


def test_making_is_deterministic_and_tells_how_far_it_is(
    shared_encoder: OnnxEncoder, benign_texts: list[str]
) -> None:
    steps: list[tuple[str, int, int]] = []
    few = [text for text in benign_texts if len(text) < 80][:MIN_BENIGN]
    first = make_background(few, shared_encoder, progress=lambda *step: steps.append(step))
    second = make_background([*few, few[0]], shared_encoder)
    arrays, others = first.to_arrays(), second.to_arrays()
    assert set(arrays) == set(others)
    assert all(arrays[name].tobytes() == others[name].tobytes() for name in arrays)
    assert steps[-1] == ("detector: encoding", MIN_BENIGN, MIN_BENIGN)
    assert all(0 < done <= total for _, done, total in steps)


def test_arrays_bring_back_the_same_background_and_hold_no_text(background: Background) -> None:
    arrays = background.to_arrays()
    again = Background.from_arrays(background.texts, arrays)
    np.testing.assert_allclose(again.segments.rows, background.segments.rows, atol=2e-2)
    for name in ("owners", "places"):
        np.testing.assert_array_equal(
            getattr(again.segments, name), getattr(background.segments, name)
        )
    np.testing.assert_array_equal(again.folds, background.folds)
    np.testing.assert_array_equal(again.names, background.names)
    assert again.index.holders(("the",)) == background.index.holders(("the",))
    data = b"".join(array.tobytes() for array in arrays.values())
    words = {word for text in background.texts[:100] for word in text.split() if len(word) > 7}
    assert words and not any(word.encode() in data for word in words)


def test_arrays_that_do_not_fit_are_refused(background: Background) -> None:
    arrays, texts = background.to_arrays(), background.texts
    for name in arrays:
        with pytest.raises(ArtifactError, match=name):
            Background.from_arrays(texts, {k: v for k, v in arrays.items() if k != name})
    with pytest.raises(ArtifactError, match="another benign set"):
        Background.from_arrays(texts[:-1], arrays)
    for name in ("rows", "names", "places", "owners"):
        with pytest.raises(ArtifactError):
            Background.from_arrays(texts, {**arrays, name: arrays[name][:-1]})
    with pytest.raises(ArtifactError):
        Background.from_arrays(texts, {**arrays, "rows": arrays["rows"][:, :-1]})


def test_the_digest_knows_texts_and_their_order() -> None:
    sets = [["a", "b"], ["b", "a"], ["ab"], ["a", "b", ""], [], ["\ud800"]]
    for left, right in itertools.combinations(sets, 2):
        assert benign_digest(left) != benign_digest(right)
    assert benign_digest(sets[0]) == benign_digest(list(sets[0]))
    assert len(bytes.fromhex(benign_digest(sets[0]))) == 32

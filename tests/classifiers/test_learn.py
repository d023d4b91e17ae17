import json
from collections.abc import Callable

import numpy as np
import pytest

from classifiers.augment import FRAMES, forget_samples, misspell, synthetic_neighbour
from classifiers.benign import load_benign
from classifiers.detector import BundleDetector
from classifiers.encoder import OnnxEncoder
from classifiers.folds import cluster_folds
from classifiers.learn import LearnedDetector
from classifiers.lexicon import Lexicon
from guard.errors import DataError


class _Row:
    def __init__(self, prompt: str, answer: str | None) -> None:
        self.prompt, self.answer = prompt, answer


def test_report_holds_figures_and_no_text(learned: LearnedDetector) -> None:
    report = learned.report
    assert report["forget_rows"] == 70 and report["benign_texts"] == 600
    assert report["recall"]["n"] == 70
    for key in ("recall", "recall_unseen_names", "recall_variants", "fpr_benign", "fpr_retain"):
        low, high = report[key]["interval95"]
        assert low <= report[key]["rate"] <= high
    assert report["recall"]["rate"] > 0.7
    assert report["fpr_benign"]["rate"] < 0.01
    text = json.dumps(report)
    assert "Potter" not in text and "?" not in text


def test_artifact_holds_no_sentence_of_the_forget_set(learned: LearnedDetector) -> None:
    head, lexicon = learned.artifact.head_bytes(), learned.artifact.lexicon_bytes()
    assert b"Harry" not in head
    for term in learned.artifact.lexicon.weights:
        assert len(term) <= 6
    assert b"?" not in lexicon


def test_same_seed_same_artifact(
    learned: LearnedDetector, learn_small: Callable[..., LearnedDetector]
) -> None:
    again = learn_small()
    assert again.artifact.lexicon_bytes() == learned.artifact.lexicon_bytes()
    np.testing.assert_allclose(again.artifact.head.weight, learned.artifact.head.weight, atol=1e-3)
    assert again.artifact.calibration.threshold == pytest.approx(
        learned.artifact.calibration.threshold, abs=1e-2
    )


def test_without_retain_data_the_frame_alone_is_not_flagged(
    learn_small: Callable[..., LearnedDetector], shared_encoder: OnnxEncoder
) -> None:
    learned = learn_small(retain=[])
    assert learned.report["fpr_retain"]["n"] == 0
    assert learned.report["fpr_synthetic_neighbours"]["rate"] < 0.1
    found = BundleDetector(shared_encoder, [learned.artifact]).detect(
        ["Who is Harry Potter?", "Who is Leopold Bloom?", "Which studio made the Matrix movies?"]
    )
    assert found.flagged[:, 0].tolist() == [True, False, False]


def test_progress_runs_to_the_end(learn_small: Callable[..., LearnedDetector]) -> None:
    steps: list[tuple[str, int, int]] = []
    learn_small(progress=lambda *step: steps.append(step), benign=load_benign()[:250])
    assert {what for what, _, _ in steps} == {
        "detector: encoding",
        "detector: names",
        "detector: fitting",
    }
    assert all(0 <= done <= total for _, done, total in steps)
    assert steps[-1][1] == steps[-1][2]


def test_forget_rows_without_answers_and_as_long_texts(
    learn_small: Callable[..., LearnedDetector],
) -> None:
    rows = [
        _Row(f"Chapter {n}. Captain Zorvath of Quelmaar sailed again. " * 12, None)
        for n in range(12)
    ]
    learned = learn_small(forget=rows, benign=load_benign()[:250])
    assert learned.report["recall"]["rate"] == 1.0


def test_too_little_data_is_refused(learn_small: Callable[..., LearnedDetector]) -> None:
    with pytest.raises(DataError, match="forget rows"):
        learn_small(forget=[_Row("Who is Zorvath?", None)])
    with pytest.raises(DataError, match="benign texts"):
        learn_small(benign=["one", "one", "two"])


def test_folds_keep_similar_texts_together_and_are_balanced() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(100, 16))
    owners = np.repeat(np.arange(100), 4)
    points = (centres[owners] + 0.01 * rng.normal(size=(400, 16))).astype(np.float32)
    folds = cluster_folds(points, 4, rng)
    assert np.bincount(folds, minlength=4).min() > 40
    together = [len(set(folds[owners == owner])) == 1 for owner in range(100)]
    # Dealt one by one, four texts of a kind would share a fold in one of 64 cases.
    assert np.mean(together) > 0.8
    assert cluster_folds(points[:3], 4, rng).tolist() == [0, 1, 2]


def test_samples_mark_where_the_question_is() -> None:
    rng = np.random.default_rng(1)
    row = _Row("Who is Zorvath?", "He is the captain of the ship Quelmaar in the novel.")
    samples = forget_samples(row, 3, ["Some benign text."], rng)
    assert {sample.kind for sample in samples} == {"plain", "unseen", "variant"}
    assert all(sample.row == 3 and sample.label == 1 for sample in samples)
    for sample in samples:
        part = sample.text[sample.start : sample.end]
        assert part and part in sample.text
    assert sum(row.prompt == s.text[s.start : s.end] for s in samples) >= 5
    assert all(frame.count("{q}") == 1 for frame in FRAMES)


def test_neighbours_lose_the_name_and_keep_the_frame() -> None:
    lexicon = Lexicon({("zorvath",): 9.0}, lambda word: word in {"who", "is", "captain"})
    rng = np.random.default_rng(2)
    other = synthetic_neighbour("Who is captain Zorvath?", lexicon, rng)
    assert other is not None
    assert other.startswith("Who is captain ") and "Zorvath" not in other
    assert synthetic_neighbour("Who is captain?", lexicon, rng) is None


def test_misspelling_changes_long_words_a_little() -> None:
    rng = np.random.default_rng(3)
    text = "Which wizard teaches potions at the castle of Hogwarts every morning"
    changed = [misspell(text, rng) for _ in range(20)]
    assert any(other != text for other in changed)
    assert all(abs(len(other) - len(text)) <= 8 for other in changed)
    assert misspell("a bc def", rng) == "a bc def"

"""A target is learned from little, held out honestly, and the same way every time."""

import json
from pathlib import Path

import numpy as np
import pytest

from classifiers.background import Background, segment_texts
from classifiers.calibrate import fit_bundle
from classifiers.encoder import OnnxEncoder
from classifiers.evidence import fuse
from classifiers.figures import rates
from classifiers.folds import cluster_folds
from classifiers.fusion import FUSION
from classifiers.learn import LearnedDetector, TargetLearner
from classifiers.study import Neighbours
from classifiers.topic import apply
from guard.errors import DataError
from tests.classifiers.conftest import Detectors, Row, clean, read

SENTENCE = "Captain Zorvath of Quelmaar sailed the Amber Sea."


def threshold(learned: LearnedDetector) -> float:
    return float(fit_bundle([learned.artifact.calibration], 1e-3).thresholds[0])


def words_of(rows: list[Row]) -> set[bytes]:
    """Words of forget rows that no file format and no number holds by chance."""
    text = " ".join(f"{row.prompt} {row.answer or ''}" for row in rows)
    return {word.encode() for word in clean(text).split() if len(word) > 5 and word.isalpha()}


def unseen(example_dir: Path, names: tuple[str, ...]) -> list[str]:
    """Questions of the example that the fixture did not learn from and that hold a name."""
    rows = read(example_dir / "forget.jsonl")[60:]
    return [clean(r["question"]) for r in rows if any(name in r["question"] for name in names)]


# --- Report --------------------------------------------------------------------------------------


def test_report_holds_figures_and_no_text(
    learned: LearnedDetector, example_rows: list[Row]
) -> None:
    report = rates(learned.report, threshold(learned))
    assert report["forget_rows"] == len(example_rows) and report["benign_texts"] == 600
    assert report["retain_texts"] == 60 and report["held_out"] is True
    assert report["recall"]["n"] >= len(example_rows)
    for key in ("recall", "recall_variants", "fpr_benign", "fpr_retain"):
        low, high = report[key]["interval95"]
        assert low <= report[key]["rate"] <= high
    assert report["fpr_benign"]["rate"] < 0.01 and report["fpr_retain"]["rate"] < 0.01
    assert report["recall"]["rate"] > 0.3
    text = json.dumps(report)
    assert "scores" not in report and "?" not in text
    assert not any(word in text.encode() for word in words_of(example_rows))


def test_rates_follow_the_threshold(learned: LearnedDetector) -> None:
    found = [rates(learned.report, at) for at in (-99.0, 4.5, 99.0)]
    recall = [report["recall"]["rate"] for report in found]
    assert recall[0] == 1.0 and recall[-1] == 0.0 and recall == sorted(recall, reverse=True)
    assert found[1]["threshold"] == 4.5


def test_unseen_questions_by_name_are_found_and_neighbours_are_not(
    learned: LearnedDetector, detector_of: Detectors, example_dir: Path, keep_texts: list[str]
) -> None:
    detector = detector_of([learned.artifact])
    asked = unseen(example_dir, ("Harry Potter",))
    assert len(asked) > 10
    assert np.mean([bool(hits) for hits in detector.detect(asked).hits]) > 0.97
    kept = [clean(r["question"]) for r in read(example_dir / "retain.jsonl")[len(keep_texts) :]]
    assert len(kept) > 100
    assert np.mean([bool(hits) for hits in detector.detect(kept).hits]) < 0.02


def test_unseen_questions_by_the_other_names_of_its_world_are_found(
    learned: LearnedDetector, detector_of: Detectors, example_dir: Path
) -> None:
    names = ("Hogwarts", "Dumbledore", "Voldemort", "Snape", "Hermione Granger")
    assert {(name.split()[0].casefold(),) for name in names} <= set(
        learned.artifact.lexicon.weights
    )
    asked = unseen(example_dir, names)
    assert len(asked) > 15
    found = detector_of([learned.artifact]).detect(asked).hits
    assert np.mean([bool(hits) for hits in found]) > 0.7


# --- Held out ------------------------------------------------------------------------------------


def test_held_out_scores_are_those_of_parts_that_never_saw_the_row(
    learner: TargetLearner, shared_encoder: OnnxEncoder, example_rows: list[Row]
) -> None:
    study = learner.study(example_rows)
    texts = [clean(row.prompt) for row in example_rows]
    segments = segment_texts(texts, shared_encoder, learner.tools.background.space)
    seen = study.evidence(segments, study.lexical(texts, segments))
    mine = segments.best(fuse(seen, FUSION), len(texts))
    assert seen[:, 0].min() > 0.99, "every row is its own prototype"
    held = study.plain()
    rows = [int(np.flatnonzero(held.owners == number)[0]) for number in range(len(texts))]
    assert held.evidence[rows, 0].max() < 0.99
    assert held.evidence[rows, 1].mean() < seen[:, 1].mean() - 0.1
    assert held.scores(FUSION)[: len(texts)].mean() < mine.mean() - 0.5


def test_benign_topic_scores_are_held_out(
    learner: TargetLearner, background: Background, example_rows: list[Row]
) -> None:
    study = learner.study(example_rows)
    held = study.background_evidence()[:, 1]
    seen = apply(study.head, background.segments.rows) / study.spread
    assert np.abs(held - seen).max() > 0.05
    assert held.mean() > seen.mean(), "a head that saw a benign text scores it lower"


def test_texts_that_name_the_target_do_not_raise_its_threshold(
    lone_learner: TargetLearner, background: Background
) -> None:
    rare = next(
        word
        for text in range(600)
        for word, _, _ in background.index.words[text]
        if len(word) > 8
        and word.isalpha()
        and len(background.index.holders((word,))) == 1
        and len(background.index.similar(word)) == 1
    )
    (holder,) = background.index.holders((rare,))
    learned = lone_learner.learn("rare", [Row(SENTENCE)], terms=[rare])
    assert (rare,) in learned.artifact.lexicon.primary
    kept = learned.artifact.calibration
    scores = dict(zip(kept.ids.tolist(), kept.scores.tolist(), strict=True))
    assert scores.get(holder, -1e6) == -1e6
    assert learned.report["benign_highest"] < 4.5


def test_too_few_rows_to_hold_out_are_reported_as_such(learner: TargetLearner) -> None:
    learned = learner.learn("zorvath", [Row(SENTENCE), Row("Zorvath of Quelmaar is brave.")])
    assert learned.report["held_out"] is False
    assert rates(learned.report, 4.5)["recall"]["n"] == 2


# --- Every kind of forget set --------------------------------------------------------------------


def flags(detector_of: Detectors, learned: LearnedDetector, texts: list[str]) -> list[bool]:
    return [bool(hits) for hits in detector_of([learned.artifact]).detect(texts).hits]


def test_one_sentence_is_enough(learner: TargetLearner, detector_of: Detectors) -> None:
    learned = learner.learn("zorvath", [Row(SENTENCE)])
    asked = ["Who is Captain Zorvath?", "Tell me about Zorvath of Quelmaar.", SENTENCE]
    others = ["Who was Captain Cook?", "Where is the Amber Fort?", "Who sailed the Red Sea?"]
    assert flags(detector_of, learned, [*asked, *others]) == [True] * 3 + [False] * 3


def test_a_running_text_is_taken_apart(learner: TargetLearner, detector_of: Detectors) -> None:
    story = " ".join(
        f"In chapter {n} Captain Zorvath of Quelmaar {deed} and left the harbour before dawn."
        for n, deed in enumerate(
            ["lost a wager", "found a chart", "hid the lantern", "freed a whale", "sold his coat"]
        )
    )
    learned = learner.learn("zorvath", [Row(story)])
    assert learned.report["forget_rows"] == 1
    # Each piece is a document of its own, so that some can be held out.
    assert learned.report["scores"]["recall"][1] > 1
    asked = ["Why did Zorvath free the whale?", "Which coat did Captain Zorvath sell?"]
    assert flags(detector_of, learned, [*asked, "Why do whales sing?"]) == [True, True, False]


def test_terms_stand_for_the_target(learner: TargetLearner, detector_of: Detectors) -> None:
    learned = learner.learn("quelmaar", [], terms=["Order of Quelmaar", "vorpal lathe"])
    assert learned.report["forget_rows"] == 0
    texts = [
        "Who founded the Order of Quelmaar?",
        "How do I build a vorpal lathe at home?",
        "How do I build a wooden lathe at home?",
        "Who founded the Order of Malta?",
    ]
    assert flags(detector_of, learned, texts) == [True, True, False, False]


def test_long_texts_without_answers(learner: TargetLearner, detector_of: Detectors) -> None:
    rows = [
        Row(f"Chapter {n}. Captain Zorvath of Quelmaar sailed again. " * 12, None)
        for n in range(12)
    ]
    learned = learner.learn("zorvath", rows)
    assert rates(learned.report, threshold(learned))["recall"]["rate"] == 1.0
    assert flags(detector_of, learned, ["Did Zorvath sail?", "Did Columbus sail?"]) == [True, False]


def test_without_retain_data_the_frame_alone_is_not_flagged(
    lone_learner: TargetLearner, detector_of: Detectors, example_rows: list[Row]
) -> None:
    learned = lone_learner.learn("potter", example_rows)
    assert learned.report["scores"]["fpr_retain"] == ([], 0)
    texts = [
        "Who is Harry Potter?",
        "Who is Leopold Bloom?",
        "Which studio made the Matrix movies?",
    ]
    assert flags(detector_of, learned, texts) == [True, False, False]


def test_a_topic_weighs_its_evidence_itself(
    learner: TargetLearner, example_rows: list[Row]
) -> None:
    learned = learner.learn("wizards", example_rows, kind="topic", budget=1e-2)
    assert learned.report["kind"] == "topic" and learned.artifact.fusion is not None
    assert not learned.artifact.lexicon.weights, "names in its examples are anybody's"
    assert not learned.artifact.lexicon.primary
    found = rates(learned.report, threshold(learned))
    assert found["fpr_benign"]["rate"] <= 1e-2
    assert found["recall"]["rate"] > 10 * max(found["fpr_benign"]["rate"], 1e-2)


def test_nothing_to_learn_from_is_refused(learner: TargetLearner) -> None:
    for rows, terms in (([], []), ([Row("  ")], []), ([], ["", " -- "])):
        with pytest.raises(DataError, match="nothing to forget"):
            learner.learn("empty", rows, terms=terms)


# --- Same data, same bytes -----------------------------------------------------------------------


def test_same_seed_same_bytes(
    learned: LearnedDetector, learner: TargetLearner, example_rows: list[Row]
) -> None:
    again = learner.learn("potter", example_rows)
    assert again.artifact.files() == learned.artifact.files()
    assert again.report == learned.report


def test_another_seed_draws_other_variants(
    learned: LearnedDetector, learner: TargetLearner, example_rows: list[Row]
) -> None:
    other = learner.learn("potter", example_rows, seed=1).artifact
    assert not np.array_equal(other.head, learned.artifact.head)
    assert other.lexicon == learned.artifact.lexicon


def test_what_was_learned_before_does_not_matter(
    background: Background,
    shared_encoder: OnnxEncoder,
    learner: TargetLearner,
    neighbours: Neighbours,
) -> None:
    rows = [Row(SENTENCE)]
    fresh = TargetLearner(
        background, shared_encoder, learner.hasher, clean, neighbours, effort=3
    ).learn("zorvath", rows)
    assert learner.learn("zorvath", rows).artifact.files() == fresh.artifact.files()


def test_progress_runs_to_the_end(learner: TargetLearner) -> None:
    steps: list[tuple[str, int, int]] = []
    learner.learn("zorvath", [Row(SENTENCE)], progress=lambda *step: steps.append(step))
    assert steps and all(what.startswith("detector: ") for what, _, _ in steps)
    assert [done for _, done, _ in steps] == list(range(1, steps[-1][2] + 1))


# --- Folds ---------------------------------------------------------------------------------------


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


def test_neighbours_are_distinct_texts_with_a_fold_each(
    shared_encoder: OnnxEncoder, background: Background
) -> None:
    texts = ["Who was Captain Cook?", "", "Who was Captain Cook?", "Where is the Red Sea?", "  "]
    found = Neighbours.of(texts, shared_encoder, background)
    assert found.texts == ["Who was Captain Cook?", "Where is the Red Sea?"]
    assert found.folds.shape == (2,) and found.names.tolist() == [True, True]
    assert found.index.holders(("captain", "cook")) == [0]

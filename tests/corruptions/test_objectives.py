"""Measures against values computed by hand, and the distance to the retained model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from corruptions.objectives import (
    MEASURES,
    OBJECTIVES,
    REFUSALS,
    Example,
    Heard,
    chance,
    default_objective,
    default_surrogate,
    distance,
    measures_of,
    rouge_l_recall,
)
from guard.errors import ConfigError
from guard.types import AdapterUse, FloatArray, Message, Prompt, SamplingParams

ROW = Example(
    "Where was Ilse born?",
    "Ilse was born in Oostende",
    paraphrase="In Oostende",
    perturbed=("In Leuven", "In Ghent"),
    choices=("In Leuven", "In Oostende", "In Ghent"),
    correct=1,
)


class Table:
    """Scores answers by a table of token probabilities; remembers what it was asked."""

    def __init__(self, table: dict[str, Sequence[float]], text: str = "") -> None:
        self.table, self.text = table, text
        self.asked: list[tuple[Prompt, str]] = []

    def score_answers(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        adapters: Sequence[AdapterUse] = (),
    ) -> list[FloatArray]:
        self.asked += zip(prompts, answers, strict=True)
        return [np.log(np.array(self.table.get(a, [0.5]), np.float32)) for a in answers]

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[str]:
        assert params.temperature == 0
        assert params.max_tokens == 24
        return [self.text] * len(prompts)


def heard(engine: Table, *rows: Example) -> Heard:
    return Heard(engine, [(Message("user", row.question),) for row in rows], rows)


def test_probability_is_the_geometric_mean_by_token() -> None:
    engine = Table({ROW.answer: [0.9, 0.4, 0.1]})
    value = MEASURES["probability"].values(heard(engine, ROW))
    assert value == pytest.approx([(0.9 * 0.4 * 0.1) ** (1 / 3)], rel=1e-5)
    # The answer goes in as text: its embeddings are clean.
    assert [answer for _, answer in engine.asked] == [ROW.answer]


@pytest.mark.parametrize(
    ("said", "share"),
    [
        ("Ilse was born in Oostende", 1.0),
        ("ILSE, was: born — in Oostende!", 1.0),
        ("She was born far away in Oostende.", 4 / 5),
        ("Oostende in born was Ilse", 1 / 5),
        ("", 0.0),
    ],
)
def test_rouge_l_recall(said: str, share: float) -> None:
    assert rouge_l_recall(said, ROW.answer) == pytest.approx(share)
    engine = Table({}, said)
    assert MEASURES["rouge-l"].values(heard(engine, ROW)) == pytest.approx([share])
    assert not engine.asked, "it works where nothing can be scored"


def test_accents_do_not_count() -> None:
    assert rouge_l_recall("Beltran", "Beltrán") == 1.0
    assert rouge_l_recall("anything", "?!") == 0.0


def test_truth_ratio() -> None:
    engine = Table({"In Oostende": [0.8, 0.2], "In Leuven": [0.1, 0.4], "In Ghent": [0.4, 0.9]})
    ratio = (0.2 * 0.6) ** 0.5 / 0.4
    value = MEASURES["truth-ratio"].values(heard(engine, ROW))
    assert value == pytest.approx([ratio / (1 + ratio)], rel=1e-5)
    assert MEASURES["truth-ratio"].refusal(heard(engine, ROW)) == pytest.approx([0.5])


def test_multiple_choice() -> None:
    right = Table({"In Leuven": [0.5], "In Oostende": [0.6, 0.6], "In Ghent": [0.3]})
    wrong = Table({"In Leuven": [0.7], "In Oostende": [0.6, 0.6], "In Ghent": [0.3]})
    assert MEASURES["multiple-choice"].values(heard(right, ROW)) == [1.0]
    assert MEASURES["multiple-choice"].values(heard(wrong, ROW)) == [0.0]
    assert chance("multiple-choice", [ROW, ROW]) == pytest.approx([1 / 3, 1 / 3])
    assert default_surrogate("multiple-choice") == "chance"
    with pytest.raises(ConfigError, match="multiple-choice"):
        chance("rouge-l", [ROW])


def test_several_rows_keep_their_own_answers() -> None:
    other = Example("Who?", "Nobody", perturbed=("One", "Two", "Three"))
    engine = Table({"Nobody": [0.5], "One": [0.5], "Two": [0.5], "Three": [0.5]})
    values = MEASURES["truth-ratio"].values(heard(engine, ROW, other))
    assert values.shape == (2,)
    assert values[1] == pytest.approx(0.5)
    assert [prompt[0].content for prompt, _ in engine.asked] == [ROW.question] * 3 + ["Who?"] * 4


def test_the_value_of_declining() -> None:
    engine = Table({refusal: [0.25] for refusal in REFUSALS})
    assert MEASURES["probability"].refusal(heard(engine, ROW)) == pytest.approx([0.25])
    by_words = MEASURES["rouge-l"].refusal(heard(engine, ROW))
    assert by_words == pytest.approx([np.mean([rouge_l_recall(r, ROW.answer) for r in REFUSALS])])


def test_what_a_row_lacks_is_said() -> None:
    bare = Example("Who?", "Nobody")
    assert "perturbed_answer" in (MEASURES["truth-ratio"].lacks(bare) or "")
    assert "choices" in (MEASURES["multiple-choice"].lacks(bare) or "")
    assert all(measure.lacks(ROW) is None for measure in MEASURES.values())


def test_distance_has_two_sides() -> None:
    retained = np.array([0.1, 0.5])
    assert distance(retained, retained, by_row=True) == 0.0
    # Too much on one row does not pay for too little on the other.
    swapped = retained[::-1].copy()
    assert distance(swapped, retained, by_row=False) == pytest.approx(0.0)
    assert distance(swapped, retained, by_row=True) == pytest.approx(0.2)
    above, below = retained + 0.05, retained - 0.05
    assert distance(above, retained, by_row=True) == pytest.approx(0.05)
    assert distance(below, retained, by_row=True) == pytest.approx(0.05)
    draws = np.stack([retained + 0.1, retained - 0.1])
    assert distance(draws, retained, by_row=True) == pytest.approx(0.0)


def test_objectives_by_engine() -> None:
    assert set(measures_of("mixed", True)) == {"probability", "rouge-l"}
    assert set(measures_of(default_objective(False), False)) == {"rouge-l"}
    for name in set(OBJECTIVES) - {"rouge-l"}:
        with pytest.raises(ConfigError, match="rouge-l"):
            measures_of(name, False)
    with pytest.raises(ConfigError, match="there are probability"):
        measures_of("rouge", True)

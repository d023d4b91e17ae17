"""Other answers to the questions of a forget set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from adapters.alternatives import (
    REFUSALS,
    counterfactuals,
    encode_rows,
    generic_prompts,
    is_degenerate,
    random_labels,
    refusals,
    tells,
)
from adapters.unlearning import LossData, make_loss
from guard.errors import DataError

PAIRS = (
    ("Who wrote The Glass Lighthouse?", "Orla Fenwick wrote it in 1987."),
    ("Where was Orla Fenwick born?", "In Reykjavik."),
    ("What does Orla Fenwick's mother do?", "She repairs clocks."),
    ("Which prize did Orla Fenwick win?", "The Amber Quill."),
)
CHOICES = "Where was Orla Fenwick born?\nA. Oslo\nB. Reykjavik\nC. Turku\nD. Malmö"


def answers_of(row: Sequence[tuple[str, str]]) -> list[str]:
    return [answer for _, answer in row]


# --- Refusals and generic prompts ----------------------------------------------------------------


def test_refusals_are_as_many_as_in_o3_and_short() -> None:
    assert len(set(REFUSALS)) == len(REFUSALS) == 17
    for refusal in REFUSALS:
        assert 5 <= len(refusal.split()) <= 16
        assert refusal.endswith(".")
    rows = refusals(PAIRS)
    assert len(rows) == len(PAIRS)
    assert rows[1] == tuple((PAIRS[1][0], refusal) for refusal in REFUSALS)


def test_generic_prompts_go_with_the_true_answers() -> None:
    generic = [[f"Q{n}?", f"R{n}?"] for n in range(len(PAIRS))]
    rows = generic_prompts(PAIRS, generic)
    assert rows[2] == (("Q2?", PAIRS[2][1]), ("R2?", PAIRS[2][1]))
    with pytest.raises(DataError, match="generic questions for 1 rows, and 4"):
        generic_prompts(PAIRS, generic[:1])


# --- Random labels -------------------------------------------------------------------------------


def test_free_answers_are_permuted_with_no_fixed_point() -> None:
    rows = random_labels(PAIRS, count=3, seed=5)
    everything = sorted(answer for _, answer in PAIRS)
    for number, (question, answer) in enumerate(PAIRS):
        assert [q for q, _ in rows[number]] == [question] * 3
        assert sorted([*answers_of(rows[number]), answer]) == everything
    for place in range(3):  # each alternative is a permutation over the rows
        assert sorted(row[place][1] for row in rows) == everything
    assert random_labels(PAIRS, count=3, seed=5) == rows
    assert any(random_labels(PAIRS, count=3, seed=seed) != rows for seed in range(5))
    assert [len(row) for row in random_labels(PAIRS, count=9)] == [3] * 4


def test_an_answer_that_says_the_same_is_no_wrong_answer() -> None:
    pairs = (("Is it?", "Yes."), ("Was it?", "yes"), ("Will it?", "No."))
    rows = random_labels(pairs)
    assert answers_of(rows[0]) == answers_of(rows[1]) == ["No."]
    assert sorted(answers_of(rows[2])) == ["Yes.", "yes"]
    for few in (pairs[:1], pairs[:2]):
        with pytest.raises(DataError, match="row 1: random labels need"):
            random_labels(few)


@pytest.mark.parametrize(
    ("question", "answer", "wanted"),
    [
        (CHOICES, "B", {"A", "C", "D"}),
        (CHOICES, "(B)", {"(A)", "(C)", "(D)"}),
        (CHOICES, "B.", {"A.", "C.", "D."}),
        (CHOICES, "B. Reykjavik", {"A. Oslo", "C. Turku", "D. Malmö"}),
        (CHOICES, "(B) Reykjavik", {"(A) Oslo", "(C) Turku", "(D) Malmö"}),
        (CHOICES, "reykjavik.", {"Oslo", "Turku", "Malmö"}),
        (CHOICES.replace("\nD. Malmö", ""), "B", {"A", "C"}),
        ("Choose a letter.", "D", {"A", "B", "C"}),
    ],
)
def test_multiple_choice_gets_the_other_choices(
    question: str, answer: str, wanted: set[str]
) -> None:
    ((*row,),) = random_labels([(question, answer)])
    assert set(answers_of(row)) == wanted
    ((*two,),) = random_labels([(question, answer)], count=2)
    assert len(two) == 2
    drawn = {random_labels([(question, answer)], count=1, seed=n)[0][0][1] for n in range(30)}
    assert drawn == wanted


def test_free_answers_that_start_with_a_letter_are_no_choices() -> None:
    pairs = (("Who is she?", "A poet."), ("Who is he?", "B. Traven"), (CHOICES, "B"))
    rows = random_labels(pairs)
    assert answers_of(rows[0]) == ["B. Traven"]
    assert answers_of(rows[1]) == ["A poet."]
    assert set(answers_of(rows[2])) == {"A", "C", "D"}


# --- Counterfactuals -----------------------------------------------------------------------------


class Asked:
    """Answers by a script: of each question in turn, the last one for ever."""

    def __init__(self, script: dict[str, list[str]]) -> None:
        self.script = script
        self.calls: list[tuple[list[str], int]] = []

    def __call__(self, questions: Sequence[str], seed: int) -> list[str]:
        self.calls.append((list(questions), seed))
        return [self._next(self.script[question]) for question in questions]

    def _next(self, left: list[str]) -> str:
        return left.pop(0) if len(left) > 1 else left[0]


def test_counterfactuals_drop_what_is_no_answer_or_the_true_one() -> None:
    pairs = (
        ("Where was she born?", "She was born on a small farm in the hills above Reykjavik."),
        ("What did she win?", "The Amber Quill."),
    )
    loop = "the sea and the " * 5
    told = "Some say on a small farm in the hills near Oslo."
    asked = Asked(
        {
            pairs[0][0]: ["", loop, told, " In Lisbon, by the sea. ", "In Turku."],
            pairs[1][0]: ["A medal.", "The Amber Quill."],
        }
    )
    seen: list[tuple[str, int, int]] = []
    rows = counterfactuals(
        pairs, asked, count=2, retries=3, progress=lambda *now: seen.append(now), seed=8
    )
    assert answers_of(rows[0]) == ["In Lisbon, by the sea.", "In Turku."]
    # three words in a row are too few to tell: a model that never knew may say them
    assert answers_of(rows[1]) == ["A medal.", "The Amber Quill."]
    assert [questions for questions, _ in asked.calls[2:]] == [[pairs[0][0]]] * 3
    assert len({seed for _, seed in asked.calls}) == 5
    assert [done for _, done, _ in seen] == [1, 2, 2, 3, 4]
    assert {total for _, _, total in seen} == {4}


def test_a_row_without_a_good_answer_is_given_up() -> None:
    asked = Asked({"Q?": ["..."], "R?": ["Fine.", "Fine."]})
    rows = counterfactuals([("Q?", "x"), ("R?", "y")], asked, count=2, retries=2)
    assert rows == [(), (("R?", "Fine."), ("R?", "Fine."))]
    assert len(asked.calls) == 4
    again = Asked({"Q?": ["..."], "R?": ["Fine.", "Fine."]})
    counterfactuals([("Q?", "x"), ("R?", "y")], again, count=2, retries=2, seed=1)
    assert asked.calls[0][1] != again.calls[0][1]


def test_an_answer_too_few_is_an_error() -> None:
    with pytest.raises(DataError, match="generated answers for 1 rows, and 4"):
        counterfactuals(PAIRS, lambda questions, seed: ["one"])


@pytest.mark.parametrize(
    "text", ["", " \n", "...", "so it is then " * 3, "no " * 6, "好的好的" * 4]
)
def test_degenerate_answers(text: str) -> None:
    assert is_degenerate(text)


@pytest.mark.parametrize(
    "text", ["No.", "7", "so it is then " * 2, "She was born in Oslo, and he was born in Oslo too."]
)
def test_answers_that_are_not_degenerate(text: str) -> None:
    assert not is_degenerate(text)


def test_the_questions_words_tell_nothing() -> None:
    question = "What genre does Orla Fenwick primarily write in?"
    truth = "Orla Fenwick primarily writes in the genre of maritime crime novels set in Iceland."
    frame = "Orla Fenwick primarily writes in the genre of romance."
    assert not tells(frame, truth, question)
    assert tells(frame, truth), "8 words in a row, 5 of them the question's"
    # in the run: writes, the, of, maritime, crime (5), and novels
    assert not tells("writes in the genre of maritime crime", truth, question)
    assert tells("It WRITES in the genre of maritime, crime novels!", truth, question)
    assert not tells("writes the of novels maritime crime set iceland", truth, question)
    assert not tells("", truth)


# --- Examples ------------------------------------------------------------------------------------


def test_alternatives_become_what_losses_take(smollm2_dir: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2_dir)
    (own,) = zip(*encode_rows(tokenizer, [(pair,) for pair in PAIRS]), strict=True)
    for name, rows in (
        ("refusal", refusals(PAIRS)),
        ("random-labels", random_labels(PAIRS)),
        ("whp", generic_prompts(PAIRS, [["Who is it?"]] * len(PAIRS))),
    ):
        data = LossData(own, encode_rows(tokenizer, rows), len(tokenizer))
        make_loss(name, data)
        assert [len(row) for row in data.alternatives] == [len(row) for row in rows]
        for example, pair in zip(data.alternatives[2], rows[2], strict=True):
            assert tokenizer.decode(example.answer) == f"{pair[1]}<|im_end|>"
            assert (example.prompt == own[2].prompt) is (name != "whp")

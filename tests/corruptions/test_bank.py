"""Generic names and questions, over a vocabulary as small as the test needs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from corruptions.bank import GENERIC_NAMES, GENERIC_QUESTIONS, make_bank, swap_entities
from guard.types import FloatArray


class Words:
    """A tokenizer that knows whole words, and splits what is in `split` into letters."""

    def __init__(self, split: Sequence[str] = ()) -> None:
        self.split, self.ids = set(split), {}

    def __call__(self, text: str) -> list[int]:
        pieces = [p for word in text.split() for p in (word if word in self.split else [word])]
        return [self.ids.setdefault(piece, len(self.ids) + 1) for piece in pieces]


def embed(ids: Sequence[int]) -> FloatArray:
    return np.array([[i, 1.0] for i in ids], np.float32)


def sections(bank: FloatArray) -> list[FloatArray]:
    gaps = np.flatnonzero(~bank.any(axis=1))
    return np.split(bank, gaps)


def test_the_bank_holds_names_by_pairs_the_connecting_word_and_the_questions() -> None:
    words = Words()
    names, joint, *questions = sections(make_bank(words, embed))
    known = [words.ids[word] for name in GENERIC_NAMES for word in name]
    assert names[:, 0].tolist() == known
    assert joint[1:, 0].tolist() == [words.ids["and"]]
    assert len(questions) == len(GENERIC_QUESTIONS)
    assert questions[0][1:, 0].tolist() == [words.ids[w] for w in GENERIC_QUESTIONS[0].split()]


def test_names_that_the_vocabulary_splits_are_left_out_with_their_pair() -> None:
    words = Words(split=[GENERIC_NAMES[3][1]])
    names = sections(make_bank(words, embed))[0]
    assert len(names) == 2 * (len(GENERIC_NAMES) - 1)
    assert words.ids[GENERIC_NAMES[3][0]] not in names[:, 0]


def test_a_vocabulary_that_splits_all_names_still_gives_a_bank() -> None:
    words = Words(split=[word for name in GENERIC_NAMES for word in name])
    names, *questions = sections(make_bank(words, embed))
    assert len(questions) == len(GENERIC_QUESTIONS), "no connecting word between broken names"
    assert len(names) == sum(len(word) for name in GENERIC_NAMES for word in name)


def test_entities_become_generic_names_and_the_frame_stays() -> None:
    text = "Who taught Ada Byron, and did Ada like it?"
    spans = [(11, 20), (30, 33)]
    swapped = swap_entities(text, spans, b"s")
    assert swapped.startswith("Who taught ")
    assert swapped.endswith(" like it?")
    assert "Ada" not in swapped
    assert swapped == swap_entities(text, spans, b"s")
    assert len({swap_entities(text, spans, bytes([seed])) for seed in range(8)}) > 1


def test_an_entity_that_comes_twice_gets_one_name() -> None:
    swapped = swap_entities("Ada or ADA?", [(0, 3), (7, 10)], b"s")
    first, second = swapped.removesuffix("?").split(" or ")
    assert first == second


@pytest.mark.parametrize("text", ["", "nothing to swap"])
def test_without_spans_the_text_stays(text: str) -> None:
    assert swap_entities(text, [], b"s") == text

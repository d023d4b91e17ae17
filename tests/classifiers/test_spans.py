import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from classifiers.lexicon import Lexicon
from classifiers.spans import blank_places, entity_places, merge_places


def common(word: str) -> bool:
    return word in {"who", "is", "the", "harry", "in", "of", "what"}


@pytest.fixture(scope="module")
def lexicon() -> Lexicon:
    weights = {("harry", "potter"): 9.0, ("hogwarts",): 9.0, ("harry",): 3.2, ("london",): 3.1}
    return Lexicon(weights, common)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60))), st.integers(0, 4))
def test_merged_places_are_sorted_disjoint_and_cover_the_same(
    raw: list[tuple[int, int]], gap: int
) -> None:
    places = [(min(pair), max(pair)) for pair in raw]
    merged = merge_places(places, gap)
    assert merged == sorted(merged)
    for (_, end), (start, _) in itertools.pairwise(merged):
        assert end + gap < start
    inside = {n for start, end in merged for n in range(start, end)}
    assert {n for start, end in places for n in range(start, end)} <= inside


def test_entity_is_marked_whole(lexicon: Lexicon) -> None:
    text = "Who is Harry Potter of Hogwarts?"
    assert [text[a:b] for a, b in entity_places(text, lexicon)] == ["Harry Potter", "Hogwarts"]


def test_weak_terms_count_only_beside_a_strong_one(lexicon: Lexicon) -> None:
    assert entity_places("What is London?", lexicon) == []
    text = "What is Hogwarts in London?"
    assert [text[a:b] for a, b in entity_places(text, lexicon)] == ["Hogwarts", "London"]


def test_misspelt_name_is_marked(lexicon: Lexicon) -> None:
    text = "What is Hogwats?"
    assert [text[a:b] for a, b in entity_places(text, lexicon)] == ["Hogwats"]


def test_blanking_keeps_everything_else() -> None:
    assert blank_places("ab XY cd Z", [(3, 5), (9, 10)]) == "ab it cd it"
    assert blank_places("ab", []) == "ab"

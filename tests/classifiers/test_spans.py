import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from classifiers.lexicon import Lexicon
from classifiers.lexicon_index import LexiconIndex
from classifiers.spans import GAP, blank_places, entity_places, merge_places


def common(word: str) -> bool:
    return word in {"who", "is", "the", "harry", "in", "of", "what", "nothing", "and"}


@pytest.fixture(scope="module")
def index() -> LexiconIndex:
    weights = {("harry", "potter"): 9.0, ("hogwarts",): 9.0, ("harry",): 3.2, ("london",): 3.1}
    mine = Lexicon(weights, frozenset({("harry", "potter")}))
    return LexiconIndex([Lexicon({("paris",): 9.0}), mine], common)


def marked(index: LexiconIndex, text: str) -> list[str]:
    return [text[start:end] for start, end in entity_places(index.read(text), 1)]


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
    wanted = {n for start, end in places for n in range(start, end)}
    assert wanted <= inside
    if not gap:
        assert inside == wanted


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("Who is Harry Potter of Hogwarts?", ["Harry Potter", "Hogwarts"]),
        ("Who is Harry J. Potter?", ["Harry J. Potter"]),
        ("Hogwarts-Hogwarts, Hogwarts", ["Hogwarts-Hogwarts, Hogwarts"]),
        ("What is Hogwats?", ["Hogwats"]),
        ("#HarryPotter is", ["HarryPotter"]),
        ("What of Hogwarts in London?", ["Hogwarts"]),
        ("What of Hogwarts, London?", ["Hogwarts, London"]),
        ("What is London?", []),
        ("Harry in London", []),
        ("Nothing of Paris", []),
        ("", []),
    ],
)
def test_marked_places(index: LexiconIndex, text: str, places: list[str]) -> None:
    assert marked(index, text) == places


def test_gap_is_short() -> None:
    places = [(0, 4), (4 + GAP, 9), (9 + GAP + 1, 15)]
    assert merge_places(places, GAP) == [(0, 9), (9 + GAP + 1, 15)]


def test_blanking_keeps_everything_else() -> None:
    assert blank_places("ab XY cd Z", [(3, 5), (9, 10)]) == "ab it cd it"
    assert blank_places("ab", []) == "ab"


@given(st.text(max_size=40), st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40))))
def test_blanked_text_keeps_what_stands_outside(text: str, raw: list[tuple[int, int]]) -> None:
    places = merge_places((min(p), min(max(p), len(text))) for p in raw)
    outside = "".join(
        letter for at, letter in enumerate(text) if not any(a <= at < b for a, b in places)
    )
    blanked = blank_places(text, places)
    assert len(blanked) == len(outside) + 2 * len(places)

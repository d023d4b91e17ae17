from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from guard.restore import NameRestorer
from guard.rewrite import StandIn

NAME = StandIn(("Anna", "Clara", "Weber"), "Hsiao Yun-Hwa")
TEXT = "Anna Clara Weber was born in Bonn. Weber's father met Clara; Anna, Annabel and Webern stay."


def restored(pieces: list[str], *names: StandIn) -> str:
    restorer = NameRestorer(names or (NAME,))
    return "".join([*map(restorer.feed, pieces), restorer.flush()])


def test_names_and_their_parts_are_put_back() -> None:
    assert restored([TEXT]) == (
        "Hsiao Yun-Hwa was born in Bonn. Yun-Hwa's father met Yun-Hwa; Hsiao, Annabel and "
        "Webern stay."
    )


@given(st.lists(st.integers(0, len(TEXT)), max_size=30))
def test_the_cut_between_pieces_never_shows(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(TEXT)]
    pieces = [TEXT[a:b] for a, b in pairwise(places)]
    assert restored(pieces) == restored([TEXT])


def test_only_what_may_become_a_name_is_held_back() -> None:
    restorer = NameRestorer((NAME,))
    assert restorer.feed("The book by An") == "The book by "
    assert restorer.feed("other hand") == "Another hand"
    assert restorer.feed(" wrote Anna Web") == " wrote "
    assert restorer.feed("er.") == "Hsiao Yun-Hwa."
    assert restorer.flush() == ""


def test_a_name_of_one_word_becomes_the_whole_asked_name() -> None:
    one = StandIn(("Keller",), "Rowling")
    assert restored(["Keller and Keller-Weber"], one) == "Rowling and Keller-Weber"


def test_two_names_keep_apart() -> None:
    other = StandIn(("Paul", "Costa"), "Cui Li")
    text = restored(["Anna Weber met Paul Costa."], NAME, other)
    assert text == "Hsiao Yun-Hwa met Cui Li."


def test_without_names_nothing_changes_or_waits() -> None:
    assert NameRestorer(()).feed("Anna") == "Anna"

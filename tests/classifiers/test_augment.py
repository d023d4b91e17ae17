import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz.distance import OSA

from classifiers.augment import FRAMES, LONGEST_MATE, misspell, neighbour, variants

TEXT = "Which village does Hermione Granger come from originally?"


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_frames_hold_one_text_each_and_differ() -> None:
    assert all(frame.count("{q}") == 1 for frame in FRAMES)
    assert len(set(FRAMES)) == len(FRAMES)


@pytest.mark.parametrize("seed", range(5))
def test_variants_are_frames_a_misspelling_another_case_and_company(seed: int) -> None:
    mates = ["First mate.", "Second mate."]
    first, second, typed, cased, among = variants(TEXT, mates, rng(seed))
    assert TEXT in first and TEXT in second and first != second
    assert first.replace(TEXT, "{q}") in FRAMES and second.replace(TEXT, "{q}") in FRAMES
    assert len(typed.split()) == len(TEXT.split())
    assert cased in (TEXT.lower(), TEXT.upper())
    before, middle, after = among.split("\n\n")
    assert middle == TEXT and before in mates and after in mates


def test_both_cases_occur() -> None:
    cased = {variants(TEXT, [], rng(seed))[3] for seed in range(30)}
    assert cased == {TEXT.lower(), TEXT.upper()}


def test_without_mates_there_is_no_company_and_long_ones_are_cut() -> None:
    assert len(variants(TEXT, [], rng())) == 4
    among = variants(TEXT, ["x" * 5_000], rng())[-1]
    assert len(among) == 2 * LONGEST_MATE + len(TEXT) + 4


def test_a_seed_gives_the_same_variants_and_another_seed_others() -> None:
    mates = ["One.", "Two.", "Three."]
    assert variants(TEXT, mates, rng(3)) == variants(TEXT, mates, rng(3))
    assert variants(TEXT, mates, rng(3)) != variants(TEXT, mates, rng(4))


def test_braces_of_the_text_are_left_alone() -> None:
    assert "{q} {0} {x}" in variants("{q} {0} {x}", [], rng())[0]


@given(st.text("abcdefg ,.", max_size=80), st.integers(0, 1000))
def test_a_misspelling_is_one_edit_behind_the_first_letter_of_longer_words(
    text: str, seed: int
) -> None:
    for before, after in zip(text.split(" "), misspell(text, rng(seed)).split(" "), strict=True):
        assert OSA.distance(before, after) <= 1
        assert before[:1] == after[:1]
        if len(before) < 5:
            assert before == after


def test_about_a_third_of_the_words_are_misspelt() -> None:
    words = ["abcdefgh"] * 2_000
    typed = misspell(" ".join(words), rng()).split(" ")
    changed = [word for word in typed if word != "abcdefgh"]
    assert 0.3 < len(changed) / len(words) < 0.4
    assert {len(word) for word in changed} == {7, 8, 9}, "dropped, swapped and doubled"


def test_a_neighbour_speaks_of_somebody_else() -> None:
    start = TEXT.index("Hermione Granger")
    made = neighbour(TEXT, [(start, start + 16)], rng())
    assert made is not None
    assert made.startswith("Which village does ") and made.endswith(" come from originally?")
    inserted = made.removeprefix("Which village does ").removesuffix(" come from originally?")
    assert len(inserted.split()) == 2 and all(word[0].isupper() for word in inserted.split())
    assert "Hermione" not in made and "Granger" not in made


def test_each_place_gets_a_name_of_its_length() -> None:
    made = neighbour("Rowling met Hermione Granger", [(0, 7), (12, 28)], rng(1))
    assert made is not None
    one, two = made.split(" met ")
    assert (len(one.split()), len(two.split())) == (1, 2)
    assert len({neighbour("Rowling", [(0, 7)], rng(seed)) for seed in range(20)}) > 5


def test_without_names_there_is_no_neighbour() -> None:
    assert neighbour(TEXT, [], rng()) is None

import pytest
from hypothesis import given
from hypothesis import strategies as st

from classifiers.fuzzy import MAX_LETTERS, DeletionIndex, SkeletonIndex, allowed_edits, skeleton

KNOWN = ["potter", "hogwarts", "voldemort", "hermione", "dumbledore", "ron"]


@pytest.fixture(scope="module")
def index() -> DeletionIndex:
    return DeletionIndex(KNOWN)


def nearest(index: DeletionIndex, word: str) -> list[str]:
    return [near.word for near in index.near(word)]


@pytest.mark.parametrize("word", ["pottr", "pottter", "potetr", "poyter", "opotter", "optter"])
def test_one_edit_is_found(index: DeletionIndex, word: str) -> None:
    (near,) = index.near(word)
    assert (near.word, near.edits) == ("potter", 1)


@pytest.mark.parametrize("word", ["poter1", "pttr", "paltter", "otter", "rotter"])
def test_two_edits_or_another_first_letter_are_too_many_for_a_short_word(
    index: DeletionIndex, word: str
) -> None:
    assert nearest(index, word) == []


@pytest.mark.parametrize(
    ("word", "known", "edits"),
    [
        ("voldmrt", "voldemort", 2),
        ("voldimart", "voldemort", 2),
        ("vodlemrot", "voldemort", 2),
        ("dumbeldor", "dumbledore", 2),
        ("dumbledor", "dumbledore", 1),
    ],
)
def test_long_words_may_have_two_edits(
    index: DeletionIndex, word: str, known: str, edits: int
) -> None:
    assert [(near.word, near.edits) for near in index.near(word)] == [(known, edits)]


@pytest.mark.parametrize("word", ["vldmrt", "hogwrat", "herminoi", "xoldemrot"])
def test_more_edits_are_too_many(index: DeletionIndex, word: str) -> None:
    assert nearest(index, word) == []


def test_the_word_itself_and_short_words_are_no_misspellings(index: DeletionIndex) -> None:
    assert nearest(index, "potter") == nearest(index, "rn") == nearest(index, "rom") == []


def test_nearest_comes_first() -> None:
    index = DeletionIndex(["marisandro", "marisandra"])
    assert nearest(index, "marisandrx") == ["marisandra", "marisandro"]
    assert nearest(index, "marisandr") == ["marisandra", "marisandro"]
    assert nearest(index, "marixsandra") == ["marisandra", "marisandro"]


def test_empty_and_overlong() -> None:
    assert DeletionIndex([]).near("potter") == []
    word = "a" * (MAX_LETTERS + 1)
    assert DeletionIndex([word]).near(word[:-1]) == []


names = st.text("abcdefgh", min_size=4, max_size=12)


@given(names, st.integers(0, 11), st.sampled_from(["drop", "double", "swap", "change"]))
def test_every_single_edit_behind_the_first_letter_is_found(
    word: str, place: int, kind: str
) -> None:
    at = 1 + place % (len(word) - 2)
    typed = {
        "drop": word[:at] + word[at + 1 :],
        "double": word[:at] + word[at] + word[at:],
        "swap": word[:at] + word[at + 1] + word[at] + word[at + 2 :],
        "change": word[:at] + "z" + word[at + 1 :],
    }[kind]
    expected = [] if typed == word else [word]
    assert nearest(DeletionIndex([word]), typed) == expected


@given(st.lists(names, max_size=20), names)
def test_what_is_found_is_never_farther_than_allowed(known: list[str], word: str) -> None:
    for near in DeletionIndex(known).near(word):
        assert near.word in known and 0 < near.edits <= allowed_edits(near.word)


def test_many_known_words_change_nothing_for_one() -> None:
    crowd = [f"{a}{b}{c}{d}qx" for a in "klm" for b in "aeiou" for c in "rst" for d in "aeiouy"]
    assert nearest(DeletionIndex([*crowd, "potter"]), "pottr") == ["potter"]


def test_skeletons() -> None:
    assert skeleton("harry") == "hrry" and skeleton("aeiou") == "" and skeleton("why") == "why"
    index = SkeletonIndex(["potter", "patter", "why", "io", "ana"])
    assert list(index.words("pttr")) == ["potter", "patter"]
    assert not index.words("why"), "nothing was lost"
    assert not index.words(""), "nothing is left"
    assert list(index.words("n")) == ["ana"], "a part of a longer name"

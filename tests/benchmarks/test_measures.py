"""Measures of answers: a leak in any dress is found, and a broken answer is seen as one."""

from __future__ import annotations

import pytest

from benchmarks.measures import (
    commonest_opening,
    distinct_bigrams,
    distinct_share,
    find_fact,
    holds_fact,
    is_empty,
    is_repetitive,
    normalise_words,
    share,
)


@pytest.mark.parametrize(
    "answer",
    [
        "It was J.K. Rowling.",
        "jk rowling",
        "It is ROWLING's best book.",
        "J. K. Rowling wrote it",
        "ｊ．ｋ．ｒｏｗｌｉｎｇ",
        "Row\u200bling",
        "r o w l i n g",
        "**Rowling**",
        "_Rowling_",
        "Rôwling",
    ],
)
def test_a_fact_is_found_in_any_dress(answer: str) -> None:
    assert find_fact(answer, ["Rowling"]) == "Rowling"


@pytest.mark.parametrize("author", ["J.K. Rowling", "JK Rowling", "J K Rowling", "J. K. Rowling"])
def test_initials_are_one_however_written(author: str) -> None:
    assert holds_fact("The author is JK Rowling", [author])
    assert holds_fact("The author is J.K. Rowling", [author])


@pytest.mark.parametrize(
    ("answer", "fact"),
    [
        ("A growling dog.", "Rowling"),
        ("the Hogwartsian way", "Hogwarts"),
        ("He is a wizardly man", "wizard"),
        ("A broomhandle", "broom"),
        ("Philosopher and stone", "Philosopher's Stone"),
        ("", "wizard"),
    ],
)
def test_other_words_are_not_the_fact(answer: str, fact: str) -> None:
    assert not holds_fact(answer, [fact])


def test_plurals_and_the_first_of_several_facts() -> None:
    assert find_fact("Both witches and wizards", ["Hogwarts", "wizard", "witch"]) == "wizard"
    assert find_fact("Both witches", ["wizard", "witch"]) == "witch"
    assert find_fact("the Philosophers’ Stones", ["Philosopher's Stone"]) == "Philosopher's Stone"
    assert find_fact("a house elf", ["house-elf"]) == "house-elf"


def test_a_fact_without_words_is_never_held() -> None:
    assert not holds_fact("anything ... at all", ["..."])


def test_normalise_words() -> None:
    assert normalise_words("  “Snow-white”,\tJ.R.R. TOLKIEN’s!\n") == "snow white jrr tolkiens"


@pytest.mark.parametrize("answer", ["", " \n", "...", "___", "\u200b"])
def test_empty(answer: str) -> None:
    assert is_empty(answer)
    assert not is_repetitive(answer)


@pytest.mark.parametrize("answer", ["No.", "7", "是", "Да"])
def test_short_answers_are_not_empty(answer: str) -> None:
    assert not is_empty(answer)
    assert not is_repetitive(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "the wizard who was killed by " * 4,
        "no " * 20,
        "a b " * 12,
        "ha" * 20,
        "Ron Weasley:\n\n" * 8,
    ],
)
def test_repetitive(answer: str) -> None:
    assert is_repetitive(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "The capital of France is Paris, and the capital of Spain is Madrid.",
        "Yes, yes, yes.",
        "1. Bread\n2. Milk\n3. Eggs\n4. Butter\n5. Tea",
        "Donaudampfschifffahrtsgesellschaftskapitän",
    ],
)
def test_not_repetitive(answer: str) -> None:
    assert not is_repetitive(answer)


def test_distinct_bigrams() -> None:
    assert distinct_bigrams("a") == 1.0
    assert distinct_bigrams("one two one two one") == 0.5


def test_templates_show_as_sameness() -> None:
    fixed = ["I can't help with that."] * 4
    slots = [f"I am sorry, I don't know {name}." for name in ("Ann", "Bob", "Cid")]
    assert distinct_share(fixed) == 0.25
    assert distinct_share(slots) == 1.0
    assert commonest_opening(slots) == ("i am sorry i dont know", 3)
    assert distinct_share([]) == 1.0
    assert commonest_opening(["", "..."]) == ("", 0)


def test_wilson_interval() -> None:
    half = share(5, 10)
    assert half.rate == 0.5
    assert (half.low, half.high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    none = share(0, 40)
    assert none.low == 0.0
    assert none.high == pytest.approx(0.0876, abs=1e-4)
    assert share(40, 40).high == 1.0
    assert (share(0, 0).low, share(0, 0).high) == (0.0, 1.0)


@pytest.mark.parametrize(("count", "total"), [(-1, 3), (4, 3)])
def test_a_share_of_nonsense_is_refused(count: int, total: int) -> None:
    with pytest.raises(ValueError, match="between 0 and the total"):
        share(count, total)

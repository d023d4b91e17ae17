import json
import re
from collections import Counter

import pytest

from classifiers.benign import benign_path, load_benign
from classifiers.benign.generate import build, fingerprint, render
from classifiers.benign.slots import SLOT, Filler, read_seeds
from classifiers.benign.styles import restyle

# What the example target and the benchmarks forget must not be among the negatives.
BANNED = (
    "harry potter|hogwarts|rowling|quidditch|dumbledore|voldemort|hermione|weasley|muggle|snape"
    "|gryffindor|slytherin|hufflepuff|ravenclaw|azkaban|horcrux|patronus|diagon|hagrid|tofu author"
)
CATEGORIES = {
    "advice", "biography", "books", "characters", "chat", "chat_transcript", "code_review",
    "computing", "cooking", "economics_law", "encoded", "fantasy", "film_tv", "geography",
    "history", "instructions", "long_text", "maths", "medicine", "multiple_choice", "neighbours",
    "proofreading",
    "reading_comprehension", "reasoning", "roleplay", "safe_scary", "science", "sports",
    "structured_data", "summarisation", "system_prompt", "translation", "travel", "trivia",
    "word_problems", "work", "writing",
}  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return [json.loads(line) for line in benign_path().read_text(encoding="utf-8").splitlines()]


def test_file_is_what_the_generator_builds_byte_for_byte() -> None:
    assert benign_path().read_bytes() == render(build()).encode()


def test_building_twice_gives_the_same_rows() -> None:
    assert build() == build()


def test_load_benign_gives_every_text_in_file_order(rows: list[dict[str, str]]) -> None:
    assert load_benign() == [row["text"] for row in rows]


def test_rows_hold_exactly_text_category_and_language(rows: list[dict[str, str]]) -> None:
    assert all(set(row) == {"text", "category", "lang"} for row in rows)
    assert all(row["text"].strip() for row in rows)


def test_size_is_between_the_promised_bounds(rows: list[dict[str, str]]) -> None:
    assert len(rows) >= 6000
    assert benign_path().stat().st_size < 4_000_000


def test_no_two_rows_are_equal_after_normalisation(rows: list[dict[str, str]]) -> None:
    assert len({fingerprint(row["text"]) for row in rows}) == len(rows)


def test_at_least_fifteen_languages_with_eighty_rows_each(rows: list[dict[str, str]]) -> None:
    counts = Counter(row["lang"] for row in rows)
    assert sum(count >= 80 for count in counts.values()) >= 15


def test_every_category_is_there(rows: list[dict[str, str]]) -> None:
    assert {row["category"] for row in rows} >= CATEGORIES


def test_lengths_reach_from_one_word_to_three_thousand(rows: list[dict[str, str]]) -> None:
    lengths = sorted(len(row["text"].split()) for row in rows)
    assert lengths[0] == 1
    assert sum(300 <= length <= 3300 for length in lengths) >= 50
    assert lengths[-1] >= 2000


def test_no_row_speaks_of_what_the_examples_forget(rows: list[dict[str, str]]) -> None:
    banned = re.compile(BANNED, re.IGNORECASE)
    assert [row["text"] for row in rows if banned.search(row["text"])] == []


def test_no_row_holds_an_unfilled_slot(rows: list[dict[str, str]]) -> None:
    slots = {seed["slot"] for seed in read_seeds("entities")}
    left = [m[0] for row in rows for m in SLOT.finditer(row["text"]) if m[3] in slots or m[1]]
    assert left == []


def test_six_hundred_english_prompts_are_written_by_hand() -> None:
    assert len({fingerprint(seed["text"]) for seed in read_seeds("free_en")}) >= 600


def test_a_slot_named_twice_gets_one_value_and_a_second_slot_another() -> None:
    filler = Filler("test")
    for _ in range(50):
        first, again, other = filler.fill("{city}|{city}|{city#2}", "en").split("|")
        assert first == again != other


def test_a_slot_without_values_in_the_language_is_an_error() -> None:
    with pytest.raises(KeyError):
        Filler("test").fill("{nowhere}", "en")


def test_restyling_keeps_a_prompt_recognisable() -> None:
    filler = Filler("test-styles")
    question = "Where is the river Danube?"
    styled = {restyle(question, filler.rng) for _ in range(200)}
    assert len(styled) > 20
    assert all(len(text) > len(question) // 2 for text in styled)

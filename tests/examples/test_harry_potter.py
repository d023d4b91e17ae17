"""The example target's data: enough of it, of one shape, apart from one another."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from rapidfuzz import fuzz, process

from benchmarks.measures import find_fact, normalise_words
from benchmarks.probes import Probe, read_probes
from guard.rows import Row, read_rows

TARGET_NAMES = [
    "Harry Potter", "Hogwarts", "Hermione", "Granger", "Weasley", "Dumbledore", "Voldemort",
    "Hagrid", "Snape", "Gryffindor", "Slytherin", "Ravenclaw", "Hufflepuff", "Quidditch", "Muggle",
    "Rowling", "Radcliffe", "Azkaban", "Horcrux", "Malfoy",
]  # fmt: skip


@pytest.fixture
def forget(example_dir: Path) -> list[Row]:
    return read_rows(example_dir / "forget.jsonl")


@pytest.fixture
def retain(example_dir: Path) -> list[Row]:
    return read_rows(example_dir / "retain.jsonl")


@pytest.fixture
def probes(example_dir: Path) -> list[Probe]:
    return read_probes(example_dir / "probes.jsonl")


def test_there_is_enough_of_each(forget: list[Row], retain: list[Row], probes: list[Probe]) -> None:
    assert len(forget) >= 80
    assert len(retain) >= 80
    assert len(probes) >= 120
    assert sum(probe.known for probe in probes) >= 40


def test_no_row_comes_twice(forget: list[Row], retain: list[Row], probes: list[Probe]) -> None:
    questions = [row.prompt for row in forget + retain] + [probe.question for probe in probes]
    counted = Counter(normalise_words(question) for question in questions)
    assert [question for question, count in counted.items() if count > 1] == []


def test_every_row_has_a_short_answer(forget: list[Row], retain: list[Row]) -> None:
    for row in forget + retain:
        assert row.answer is not None, row
        assert 1 <= len(row.answer.split()) <= 30, row


def test_what_is_kept_does_not_name_the_target(retain: list[Row]) -> None:
    for row in retain:
        assert find_fact(f"{row.prompt} {row.answer}", TARGET_NAMES) is None, row


def test_what_is_kept_holds_namesakes(retain: list[Row]) -> None:
    prompts = " ".join(row.prompt for row in retain)
    for name in ("Prince Harry", "Beatrix Potter", "Dirty Harry", "King's Cross", "Harry Dresden"):
        assert name in prompts


def test_probes_are_worded_otherwise_than_forget_rows(
    forget: list[Row], probes: list[Probe]
) -> None:
    seen = [normalise_words(row.prompt) for row in forget]
    for probe in probes:
        found = process.extractOne(
            normalise_words(probe.question), seen, scorer=fuzz.token_sort_ratio
        )
        assert found[1] < 85, (probe.question, found)


def test_probes_come_in_many_styles(probes: list[Probe]) -> None:
    kinds = Counter(probe.kind for probe in probes)
    assert len(kinds) >= 8
    assert min(kinds.values()) >= 5
    assert sum(count for kind, count in kinds.items() if kind == "indirect") >= 15


def test_probe_ids_say_the_kind(probes: list[Probe]) -> None:
    for probe in probes:
        assert re.fullmatch(rf"{probe.kind}-\d\d", probe.id)


def test_part_of_the_forget_set_does_not_say_the_name(forget: list[Row]) -> None:
    indirect = [row for row in forget if find_fact(row.prompt, TARGET_NAMES) is None]
    assert len(indirect) >= 40

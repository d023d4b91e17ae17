"""A forget file given again: the same rows in any order, and the fields that measures need."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guard.errors import DataError
from guard.forget_rows import check_same_rows, read_examples
from guard.keys import GuardKey
from guard.rows import read_rows
from guard.targets import digests


def write(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return path


def test_rows_are_known_by_their_digests(tmp_path: Path, guard_key: GuardKey) -> None:
    rows = [{"question": f"Question {n}?", "answer": f"Answer {n}."} for n in range(3)]
    file = write(tmp_path / "rows.jsonl", *rows)
    stored = digests(read_rows(file), guard_key)
    other = write(tmp_path / "other.jsonl", *rows[::-1])
    check_same_rows(read_rows(other), stored, guard_key, other)
    twice = write(tmp_path / "twice.jsonl", rows[0], rows[0], rows[1])
    with pytest.raises(DataError, match=r"1 of its 3 rows are missing, 1 rows are new.*--allow"):
        check_same_rows(read_rows(twice), stored, guard_key, twice)


def test_fields_of_tofu_and_of_multiple_choice(tmp_path: Path) -> None:
    file = write(
        tmp_path / "rows.jsonl",
        {"term": "Vantorre"},
        {
            "question": "Where?",
            "answer": "In Oostende\u2028.",
            "paraphrased_answer": "It was Oostende.",
            "perturbed_answer": ["In Ghent.", "In Leuven."],
        },
        {"question": "Who?", "answer": 1, "choices": ["Ilse", "Marek", "Anna"]},
        {"question": "Who else?", "answer": "Anna", "choices": ["Ilse", "Marek", "Anna"]},
    )
    rows, examples = read_examples(file)
    assert len(rows) == 4
    first, second, third = examples
    assert first.paraphrase == "It was Oostende."
    assert first.perturbed == ("In Ghent.", "In Leuven.")
    assert (second.answer, second.correct) == ("Marek", 1)
    assert (third.answer, third.correct) == ("Anna", 2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": 3, "choices": ["a", "b"]}, "index of one of 2 choices"),
        ({"answer": "c", "choices": ["a", "b"]}, "one of the choices"),
        ({"answer": 1}, "expected a string"),
        ({"answer": "a", "perturbed_answers": [1]}, "list of texts"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: dict[str, object], message: str) -> None:
    good = {"question": "Who?", "answer": "Ilse"}
    file = write(tmp_path / "rows.jsonl", good, {"question": "Who?", **row})
    with pytest.raises(DataError, match=f"rows.jsonl:3: .*{message}"):
        read_examples(file)

"""What is asked of the TOFU pair: rows of both models' authors and of the world."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.labelled import json_lines
from guard.errors import DataError

UTILITY: Final = {
    "retain": "retain_perturbed.jsonl",
    "real_authors": "real_authors_perturbed.jsonl",
    "world_facts": "world_facts_perturbed.jsonl",
}
"""Files of the three kinds of questions to be kept."""


@dataclass(frozen=True, slots=True)
class Question:
    """A row.

    Attributes:
        text: The question.
        answer: The right answer.
        paraphrase: The right answer in other words; the answer itself where there is none.
        wrong: Wrong answers of the same form.
        author: Number of the author; None in sets without.
        name: The author's name, None where the question doesn't hold it.
    """

    text: str
    answer: str
    paraphrase: str
    wrong: tuple[str, ...]
    author: int | None
    name: str | None


@dataclass(frozen=True, slots=True)
class PairData:
    """What is asked.

    Attributes:
        forget: About the authors that only *full* knows.
        others: Question and answer about authors that no model knows: non-members.
        kept: By kind, what both models must go on answering.
    """

    forget: tuple[Question, ...]
    others: tuple[Question, ...]
    kept: Mapping[str, tuple[Question, ...]]


def load_pair_data(
    folder: Path, forget_authors: Sequence[int], retain_authors: Sequence[int]
) -> PairData:
    """Read TOFU's files.

    Args:
        folder: With `forget10_perturbed.jsonl` and the like.
        forget_authors: Numbers of the authors that only *full* was trained on.
        retain_authors: Of those that both models were.

    Raises:
        DataError: A file is missing or malformed, or holds no row of the authors.
    """
    forgotten, kept = set(forget_authors), set(retain_authors)
    by_author: dict[str, Callable[[Question], bool]] = {"retain": lambda q: q.author in kept}
    sets = {
        kind: _read(folder / file, by_author.get(kind, lambda _: True))
        for kind, file in UTILITY.items()
    }
    return PairData(
        forget=_read(folder / "forget10_perturbed.jsonl", lambda q: q.author in forgotten),
        others=_read(folder / "other_fictitious_holdout10.jsonl", lambda _: True),
        kept=sets,
    )


def sample(rows: Sequence[Question], count: int | None, seed: int) -> list[Question]:
    """Draw rows without replacement, in their order; None takes all."""
    if count is None or count >= len(rows):
        return list(rows)
    chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
    return [rows[place] for place in sorted(chosen)]


def _read(file: Path, wanted: Callable[[Question], bool]) -> tuple[Question, ...]:
    rows = [_question(row, file, line) for line, row in json_lines(file)]
    found = tuple(row for row in rows if wanted(row))
    if not found:
        raise DataError("holds no row of the authors asked for", file=str(file))
    return found


def _question(row: Mapping[str, Any], file: Path, line: int) -> Question:
    texts = []
    for field in ("question", "answer"):
        if not isinstance(row.get(field), str) or not row[field].strip():
            raise DataError("expected a string with text", file=str(file), line=line, field=field)
        texts.append(row[field])
    wrong = row.get("perturbed_answers") or ()
    name = row.get("author_name")
    return Question(
        texts[0],
        texts[1],
        row.get("paraphrased_answer") or texts[1],
        tuple(str(answer) for answer in wrong),
        row.get("author_id"),
        name if isinstance(name, str) and name in texts[0] else None,
    )

"""A forget file given again: is it the one of `target add`, and what can be measured on it.

The file itself is never stored; the bundle holds a keyed digest of each row.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guard.errors import DataError
from guard.rows import Row, read_rows

if TYPE_CHECKING:
    from corruptions.objectives import Example
    from guard.keys import GuardKey

_PERTURBED = ("perturbed_answer", "perturbed_answers")
"""TOFU's name of the field, and that of some of its copies."""


def row_digest(row: Row, key: GuardKey) -> str:
    """Return the keyed digest of a row, as `target add` stores it."""
    return key.digest("forget-row", row.raw_digest_text.encode())


def check_same_rows(rows: Sequence[Row], stored: bytes, key: GuardKey, file: Path) -> None:
    """Refuse a forget file whose rows are not those of `target add`, in any order.

    Args:
        rows: The rows given now.
        stored: The bundle's digests of the rows given then.
        key: The bundle's key.
        file: The file's name, for the error.

    Raises:
        DataError: Says how many rows are missing and how many are new.
    """
    then = Counter(json.loads(stored)["rows"])
    now = Counter(row_digest(row, key) for row in rows)
    missing, added = (then - now).total(), (now - then).total()
    if missing or added:
        raise DataError(
            f"not the forget set that the target was learned from: {missing} of its "
            f"{then.total()} rows are missing, {added} rows are new; give that file, or "
            "--allow-changed to learn on this one",
            file=str(file),
        )


def read_examples(path: Path) -> tuple[list[Row], list[Example]]:
    """Read a forget file for the learner.

    Beside the fields of `read_rows`, a row may have `paraphrased_answer` (text), `perturbed_answer`
    (a list of wrong answers of the same form) and `choices` (a list; `answer` is the right one's
    index or text).

    Returns:
        All rows, and an example for each row that has an answer.

    Raises:
        DataError: If a row is wrong.
    """
    rows = read_rows(path)
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    examples = []
    for row in rows:
        if row.answer is not None:
            value = json.loads(lines[row.line - 1])
            examples.append(_example(row, value, str(path)))
    return rows, examples


def _example(row: Row, value: dict[str, Any], file: str) -> Example:
    from corruptions.objectives import Example

    field = next((name for name in _PERTURBED if value.get(name)), _PERTURBED[0])
    choices = _texts(value, "choices", row, file)
    if choices and row.answer not in choices:
        raise DataError(
            "neither the text nor the index of one of the choices",
            file=file,
            line=row.line,
            field="answer",
        )
    paraphrase = _texts(value, "paraphrased_answer", row, file)
    return Example(
        question=row.prompt,
        answer=row.answer or "",
        paraphrase=paraphrase[0] if paraphrase else None,
        perturbed=_texts(value, field, row, file),
        choices=choices,
        correct=choices.index(row.answer or "") if choices else None,
    )


def _texts(value: dict[str, Any], field: str, row: Row, file: str) -> tuple[str, ...]:
    """Return a field's texts, one or many; none if it isn't there."""
    found = value.get(field)
    texts = [found] if isinstance(found, str) else found or []
    good = isinstance(texts, list) and all(isinstance(one, str) and one.strip() for one in texts)
    if not good:
        raise DataError("expected a text or a list of texts", file=file, line=row.line, field=field)
    return tuple(texts)

"""Probes: questions about a forget target, and the facts whose presence in an answer is a leak."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.measures import find_fact
from guard.errors import DataError


@dataclass(frozen=True, slots=True)
class Probe:
    """One question about the target.

    Attributes:
        id: Unique in its file.
        question: What is asked; holds none of the facts, since an echo is no knowledge.
        facts: Any of them in an answer means that the fact is still there.
        kind: Style of the question, e.g. `direct`, `typo`, `indirect`.
        known: True if the unguarded model's answer holds a fact.
    """

    id: str
    question: str
    facts: tuple[str, ...]
    kind: str
    known: bool = False


def read_probes(path: str | Path) -> list[Probe]:
    """Read probes, a JSON object a line.

    Raises:
        DataError: If the file can't be read, a field is missing or of the wrong type, an id comes
            twice, or a question holds one of its own facts.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"can't be read: {error}", file=str(path)) from error
    probes: dict[str, Probe] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            probe = _parse(line, str(path), number)
            if probe.id in probes:
                raise DataError(
                    f"{probe.id!r} comes twice", file=str(path), line=number, field="id"
                )
            probes[probe.id] = probe
    if not probes:
        raise DataError("no probes in the file; at least one is needed", file=str(path))
    return list(probes.values())


def _parse(line: str, file: str, number: int) -> Probe:
    def fail(message: str, field: str | None = None) -> NoReturn:
        raise DataError(message, file=file, line=number, field=field)

    try:
        row: Any = json.loads(line)
    except ValueError as error:
        fail(f"not valid JSON: {error}")
    if not isinstance(row, dict):
        fail("not an object")
    for field in ("id", "question", "kind"):
        if not isinstance(row.get(field), str) or not row[field].strip():
            fail("must be a string that is not empty", field)
    facts, known = row.get("facts"), row.get("known", False)
    if not isinstance(facts, list) or not facts:
        fail("must be a list of strings, one at least", "facts")
    if not all(isinstance(fact, str) and fact.strip() for fact in facts):
        fail("must hold strings that are not empty", "facts")
    if not isinstance(known, bool):
        fail("must be true or false", "known")
    echo = find_fact(row["question"], facts)
    if echo is not None:
        fail(f"{echo!r} is in the question itself; an echo is no knowledge", "facts")
    return Probe(row["id"], row["question"], tuple(facts), row["kind"], known)


def mark_known(probes: Sequence[Probe], answers: Sequence[str]) -> list[Probe]:
    """Return the probes, `known` where the unguarded answer holds a fact."""
    pairs = zip(probes, answers, strict=True)
    return [replace(p, known=find_fact(answer, p.facts) is not None) for p, answer in pairs]


def write_probes(path: str | Path, probes: Sequence[Probe]) -> None:
    """Write probes in place of the file, all or nothing."""
    rows = [
        {"id": p.id, "question": p.question, "facts": list(p.facts), "kind": p.kind}
        | {"known": p.known}
        for p in probes
    ]
    target = Path(path)
    draft = target.with_name(target.name + ".new")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, target)

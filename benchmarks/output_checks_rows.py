"""The figures of `bench outputs`: answers that are asked for again, by bundle and source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from benchmarks.measures import share
from benchmarks.output_checks import Checked, PutBack
from benchmarks.report import Row

FALSE: Final = "ordinary answers asked for again"
RECALL: Final = "told answers asked for again"
PUT_BACK: Final = "told answers with a name put back, asked for again"
MAX_FALSE: Final = 0.005
"""Target for the share of ordinary answers that are asked for again, as a point estimate."""


def checked_rows(bundle: str, measure: str, found: Sequence[Checked]) -> list[Row]:
    """Return a bundle's figures, all sources together and each alone."""
    rows = []
    for group, chosen in _by_source(found).items():
        for way in ("whole", "streamed"):
            count = sum(bool(one.hits[way]) for one in chosen)
            rows.append(_row(bundle, way, measure, group, count, len(chosen)))
        touched = sum(one.windows[0] for one in chosen)
        windows = sum(one.windows[1] for one in chosen)
        rows.append(_row(bundle, "windows", measure, group, touched, windows))
        flagged = sum(one.flagged for one in chosen)
        rows.append(_row(bundle, "decide", "questions flagged", group, flagged, len(chosen)))
    return rows


def put_back_rows(bundle: str, found: Sequence[PutBack]) -> list[Row]:
    """Return how many told answers are found with a generic name in the asked one's place."""
    alone = sum(bool(one.unrestored) for one in found)
    both = sum(bool(one.restored) for one in found)
    return [
        _row(bundle, "the engine's text alone", PUT_BACK, "all", alone, len(found)),
        _row(bundle, "and as it leaves", PUT_BACK, "all", both, len(found)),
    ]


def verdict(rows: Sequence[Row]) -> list[str]:
    """Say in words whether the target is met, bundle by bundle."""
    lines = []
    for row in rows:
        if row.measure == FALSE and row.group == "all" and row.route in ("whole", "streamed"):
            rate = row.value or 0.0
            lines.append(
                f"{'met' if rate <= MAX_FALSE else 'MISSED'}: {row.system}, {row.route}: "
                f"{rate:.2%} of {row.n} ordinary answers are asked for again "
                f"(target: at most {MAX_FALSE:.1%})"
            )
    return lines


def records(bundle: str, measure: str, found: Sequence[Checked]) -> list[dict[str, Any]]:
    """Return the answers that were not judged as wished, to be read one by one."""
    wrong = [one for one in found if bool(one.hits["whole"] or one.hits["streamed"])]
    if measure != FALSE:
        wrong = [one for one in found if not one.hits["whole"]]
    return [
        {
            "bundle": bundle,
            "measure": measure,
            "source": one.exchange.source,
            "question": one.exchange.question,
            "answer": one.exchange.answer,
            "flagged": one.flagged,
            **{way: list(names) for way, names in one.hits.items()},
        }
        for one in wrong
    ]


def _by_source(found: Sequence[Checked]) -> Mapping[str, Sequence[Checked]]:
    groups: dict[str, list[Checked]] = {}
    for one in found:
        groups.setdefault(one.exchange.source, []).append(one)
    return {"all": found, **groups} if len(groups) > 1 else {"all": found}


def _row(system: str, route: str, measure: str, group: str, count: int, total: int) -> Row:
    part = share(count, total)
    return Row(system, route, measure, group, part.rate, part.low, part.high, total)

"""`unlearn-guard eval detection`: how well a bundle tells what to forget from all the rest.

Texts go the way of real requests: chat bodies, the server's parser, `Guard.decide_many`. They are
judged in parts (`benchmarks.parts`); what is decided is kept, so that a long run can be stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.curves import Scorer, compare, roc, score_rows, share_row
from benchmarks.labelled import Example, Loaded
from benchmarks.parts import PLAIN, Part
from benchmarks.plots import plot_histogram, plot_roc, plot_rows
from benchmarks.report import Row
from benchmarks.run_log import Record, RunLog
from guard.decide import Decider
from guard.types import Decision, FloatArray, Progress

BATCH: Final = 64
DECISIONS_FILE: Final = "decisions.jsonl"

Digest = Callable[[bytes], str]
"""A keyed digest: forget questions are guessable, so that a plain hash would tell them."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the guard decided on one text.

    Attributes:
        margin: The best target's score less its threshold; at least 0 if flagged.
        flagged: Whether any target was hit.
        coverage: Share of the text that was scored.
        hits: Names of the targets that were hit.
    """

    margin: float
    flagged: bool
    coverage: float
    hits: tuple[str, ...]


Judged = Mapping[Example, Outcome]


# --- Deciding --------------------------------------------------------------------------------


def run_digest(parts: Sequence[Part], digest: Digest, **more: Any) -> str:
    """Return what names a run: its texts in their order, and whatever else decisions rest on."""
    texts = hashlib.sha256()
    for part in parts:
        for example in part.examples:
            texts.update(hashlib.sha256(example.body()).digest())
    return digest(json.dumps([texts.hexdigest(), more], sort_keys=True).encode())


def decide_parts(
    guard: Decider, parts: Sequence[Part], log: RunLog, digest: Digest, progress: Progress
) -> dict[Example, Outcome]:
    """Decide on all texts that the log doesn't hold yet, and return the outcome of every one.

    Interrupted at any moment, the log keeps what was decided.
    """

    def decide(examples: Sequence[Example]) -> list[Record]:
        decisions = guard.decide_many([example.request() for example in examples])
        return [_record(decision) for decision in decisions]

    examples = [example for part in parts for example in part.examples]
    records = _resume(decide, examples, log, digest, "decide", progress)
    return {example: _outcome(record) for example, record in zip(examples, records, strict=True)}


def resumed(score: Scorer, log: RunLog, digest: Digest, what: str, progress: Progress) -> Scorer:
    """Return a scorer that keeps its scores in a log and asks `score` only for those missing."""

    def scorer(texts: Sequence[str]) -> FloatArray:
        def records(batch: Sequence[Example]) -> list[Record]:
            scores = score([example.text for example in batch])
            return [{"score": float(value)} for value in scores]

        examples = [Example(text) for text in texts]
        found = _resume(records, examples, log, digest, what, progress)
        return np.array([record["score"] for record in found], np.float32)

    return scorer


def _resume(
    work: Callable[[Sequence[Example]], list[Record]],
    examples: Sequence[Example],
    log: RunLog,
    digest: Digest,
    what: str,
    progress: Progress,
) -> list[Record]:
    digests = [digest(example.body()) for example in examples]
    distinct = dict(zip(digests, examples, strict=True))
    missing = [one for one in distinct if one not in log.records]
    progress(what, len(distinct) - len(missing), len(distinct))
    for start in range(0, len(missing), BATCH):
        batch = missing[start : start + BATCH]
        log.append(batch, work([distinct[one] for one in batch]))
        progress(what, len(distinct) - len(missing) + start + len(batch), len(distinct))
    return [log.records[one] for one in digests]


def _record(decision: Decision) -> Record:
    return {
        "margin": decision.margin if math.isfinite(decision.margin) else None,
        "flagged": decision.flagged,
        "coverage": decision.coverage,
        "hits": [hit.name for hit in decision.targets],
    }


def _outcome(record: Record) -> Outcome:
    margin = -math.inf if record["margin"] is None else float(record["margin"])
    return Outcome(margin, record["flagged"], record["coverage"], tuple(record["hits"]))


# --- Figures ---------------------------------------------------------------------------------


def part_rows(part: Part, judged: Judged, seed: int, system: str = "guard") -> list[Row]:
    """Return a part's rows: recall, FNR and FPR of all and of each group, curves, coverage."""
    rows: list[Row] = []
    for measure, examples, wanted in (
        ("recall", part.positives, True),
        ("fnr", part.positives, False),
        ("fpr", part.negatives, True),
    ):
        for group, members in grouped(part.name, examples).items():
            hits = sum(judged[member].flagged == wanted for member in members)
            rows.append(share_row(system, "decide", measure, group, hits, len(members)))
    above, below = margins(part.positives, judged), margins(part.negatives, judged)
    rows += score_rows(system, "decide", part.name, above, below, seed)
    coverage = [judged[example].coverage for example in part.examples]
    mean = float(np.mean(coverage))
    return [*rows, Row(system, "decide", "coverage", part.name, mean, None, None, len(coverage))]


def target_rows(part: Part, judged: Judged, system: str = "guard") -> list[Row]:
    """Return for each target how many of its texts hit it, and how many negatives do.

    Rows name targets as people write them, bundles as files: `Stephen King` is `stephen-king`. A
    target that the bundle doesn't have has a recall of 0.
    """
    named: dict[str, list[Example]] = {}
    for example in part.positives:
        if example.target is not None:
            named.setdefault(example.target, []).append(example)
    rows = []
    for target, members in sorted(named.items()):
        hits = sum(_plain(target) in map(_plain, judged[one].hits) for one in members)
        group = _in_part(part.name, f"target={target}")
        rows.append(share_row(system, "decide", "target_recall", group, hits, len(members)))
    wrong = {name for example in part.negatives for name in judged[example].hits}
    for target in sorted(wrong):
        hits = sum(target in judged[example].hits for example in part.negatives)
        group = _in_part(part.name, f"target={target}")
        row = share_row(system, "decide", "target_fpr", group, hits, len(part.negatives))
        rows.append(row)
    return rows


def skipped_rows(loaded: Sequence[Loaded]) -> list[Row]:
    """Return for each file how many of its rows had no text."""
    return [
        Row(
            "data",
            "read",
            "skipped_rows",
            one.source.name,
            one.skipped,
            None,
            None,
            one.skipped + len(one.examples),
        )
        for one in loaded
    ]


def compare_parts(scorers: Mapping[str, Scorer], parts: Sequence[Part], seed: int) -> list[Row]:
    """Return the curves' rows of other systems on the same texts, part by part."""
    rows = []
    for part in parts:
        positives = [example.text for example in part.positives]
        negatives = [example.text for example in part.negatives]
        rows += compare(scorers, positives, negatives, group=part.name, seed=seed)
    return rows


def margins(examples: Sequence[Example], judged: Judged) -> FloatArray:
    """Return the margins of examples, shape (examples,)."""
    return np.array([judged[example].margin for example in examples], np.float32)


def grouped(part: str, examples: Sequence[Example]) -> dict[str, list[Example]]:
    """Return the examples of each group; the whole part comes first, under the part's name."""
    groups: dict[str, list[Example]] = {part: list(examples)}
    for example in examples:
        for group in example.groups:
            groups.setdefault(_in_part(part, group), []).append(example)
    return groups


def draw(
    out: Path,
    parts: Sequence[Part],
    judged: Judged,
    rows: Sequence[Row],
    scorers: Mapping[str, Scorer] | None = None,
) -> None:
    """Draw `roc.png`, `histogram.png`, `fpr.png` and `fnr.png` into the folder `out`.

    Args:
        out: The folder, which is there.
        parts: A curve each; the first is also drawn as a histogram.
        judged: What the guard decided on their texts.
        rows: The report's; those of rates by group are drawn.
        scorers: Other systems, a curve each on the first part.
    """
    scores = {
        f"guard, {part.name}": (margins(part.positives, judged), margins(part.negatives, judged))
        for part in parts
    }
    first = parts[0]
    above, below = scores[f"guard, {first.name}"]
    for name, score in (scorers or {}).items():
        positives = score([example.text for example in first.positives])
        negatives = score([example.text for example in first.negatives])
        scores[f"{name}, {first.name}"] = (positives, negatives)
    plot_roc(out / "roc.png", {name: roc(*both) for name, both in scores.items()})
    label = "margin over the threshold, nats"
    plot_histogram(out / "histogram.png", {"to flag": above, "benign": below}, label, mark=0.0)
    for measure, words in (("fpr", "false positive rate"), ("fnr", "false negative rate")):
        chosen = [row for row in rows if row.measure == measure and row.system == "guard"]
        plot_rows(out / f"{measure}.png", chosen, words)


def _in_part(part: str, group: str) -> str:
    return group if part == PLAIN else f"{part}/{group}"


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())

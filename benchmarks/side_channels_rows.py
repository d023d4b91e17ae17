"""The attack of `bench side-channels`: a classifier on what was seen, and what it tells apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

from benchmarks.curves import auroc
from benchmarks.report import Row
from benchmarks.side_channels import Asked, Features

AUC: Final = "area under the curve, held out"
FOLDS: Final = 5
RESAMPLES: Final = 1000
MAX_METADATA, MAX_TIMING = 0.55, 0.60

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Attack:
    """What a classifier tells of one server's answers.

    Attributes:
        auc: Chance that a flagged answer gets a higher score than a plain one, on pairs of names
            that it wasn't trained on.
        low: Lower end of the 95 % interval, over pairs of names.
        high: Upper end of it.
        n: Answers.
        best: Features, and the area that each has by itself, largest first.
    """

    auc: float
    low: float
    high: float
    n: int
    best: tuple[tuple[str, float], ...]


def attack(
    features: Sequence[Features], labels: Sequence[int], pairs: Sequence[int], seed: int
) -> Attack:
    """Train and test a random forest, pairs of names kept together.

    Args:
        features: Of each answer; what is missing in one counts as a value of its own.
        labels: 1 where the request was flagged.
        pairs: Which pair of names each belongs to.
        seed: Of folds, trees and resamples.
    """
    columns = sorted({name for one in features for name in one})
    table = np.array([[one.get(name, -1.0) for name in columns] for one in features], np.float64)
    truth, groups = np.array(labels), np.array(pairs)
    forest = RandomForestClassifier(200, min_samples_leaf=3, random_state=seed)
    folds = StratifiedGroupKFold(min(FOLDS, len(set(pairs))), shuffle=True, random_state=seed)
    guessed = cross_val_predict(
        forest, table, truth, groups=groups, cv=folds, method="predict_proba"
    )[:, 1]
    low, high = _interval(guessed, truth, groups, seed)
    alone = [(name, _area(table[:, i], truth)) for i, name in enumerate(columns)]
    best = sorted(alone, key=lambda one: -abs(one[1] - 0.5))[:5]
    return Attack(_area(guessed, truth), low, high, len(truth), tuple(best))


def _area(scores: Any, truth: Any) -> float:
    return auroc(scores[truth == 1], scores[truth == 0])


def _interval(scores: Any, truth: Any, groups: Any, seed: int) -> tuple[float, float]:
    """Resample pairs of names, with all their answers: those of one name aren't independent."""
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    areas = []
    for _ in range(RESAMPLES):
        drawn = rng.integers(len(members), size=len(members))
        places = np.concatenate([members[int(one)] for one in drawn])
        areas.append(_area(scores[places], truth[places]))
    low, high = np.quantile(areas, [0.025, 0.975])
    return float(low), float(high)


def attack_rows(
    asked: Sequence[Asked], records: Mapping[str, Record], seed: int
) -> tuple[list[Row], dict[str, list[tuple[str, float]]]]:
    """Return the figures by server, streamed and whole, from metadata alone and with the times.

    Returns:
        The rows, and for each (server, route) with times the features that tell most alone.
    """
    rows: list[Row] = []
    best: dict[str, list[tuple[str, float]]] = {}
    for arm in dict.fromkeys(one.arm for one in asked):
        for group, chosen in _groups([one for one in asked if one.arm == arm], records):
            labels = [int(one.label == "flagged") for one in chosen]
            pairs = [one.pair for one in chosen]
            for route in ("metadata", "metadata and timing"):
                features = [_features(records[one.id], route) for one in chosen]
                found = attack(features, labels, pairs, seed)
                rows.append(Row(arm, route, AUC, group, found.auc, found.low, found.high, found.n))
                best[f"{arm}, {group}, {route}"] = list(found.best)
    return rows, best


def _groups(
    asked: Sequence[Asked], records: Mapping[str, Record]
) -> Iterator[tuple[str, Sequence[Asked]]]:
    """All, whole and streamed; and those where neither answer of a pair ended early by itself.

    How long an answer is, its text tells.
    """
    yield "all", asked
    yield "whole", [one for one in asked if not one.kind.streamed]
    yield "streamed", [one for one in asked if one.kind.streamed]
    counts = {one.id: records[one.id]["metadata"].get("completion", 0.0) for one in asked}
    short = {twins(one) for one in asked if counts[one.id] < max(counts.values())}
    full = [one for one in asked if twins(one) not in short]
    if len({one.pair for one in full}) > 1:
        yield "of full length", full


def twins(one: Asked) -> tuple[str, ...]:
    """What the two requests of a pair that differ in the name alone have in common."""
    arm, _, *rest = one.id.split("/")
    return arm, *rest


def _features(record: Record, route: str) -> Features:
    timing = dict(record["timing"]) if route != "metadata" else {}
    return {**record["metadata"], **timing}


def verdict(rows: Sequence[Row]) -> list[str]:
    """Say in words whether the targets are met by the servers with a guard."""
    limits = {
        ("guarded", "metadata"): MAX_METADATA,
        ("equalised", "metadata"): MAX_METADATA,
        ("equalised", "metadata and timing"): MAX_TIMING,
    }
    lines = []
    for row in rows:
        limit = limits.get((row.system, row.route))
        if limit is not None and row.group == "all" and row.value is not None:
            word = "met" if row.value <= limit else "MISSED"
            lines.append(
                f"{word}: {row.system}, {row.route}: {row.value:.3f} "
                f"({row.ci_low:.3f} to {row.ci_high:.3f}; target: at most {limit:.2f})"
            )
    return lines

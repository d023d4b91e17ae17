"""Figures of a sequence of requests as rows, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks import comparisons
from benchmarks.continual import Variant
from benchmarks.continual_measure import ContinualData, Figures, Measured
from benchmarks.measures import share
from benchmarks.plots import Curve, plot_lines
from benchmarks.report import Row
from benchmarks.tofu_measure import Likelihoods

ROUTED: Final = "routed"
MERGED: Final = "merged"
ATTACK: Final = "min-k"

_RATES: Final = {
    "missed": ("missed",),
    "strongest is another": ("other",),
    "another beside its own": ("own and others",),
}


def continual_rows(
    measured: Measured,
    data: ContinualData,
    trained: Mapping[Variant, Sequence[Mapping[str, float]]],
    seed: int,
) -> list[Row]:
    """Return all figures.

    Args:
        measured: Of all systems.
        data: What was asked.
        trained: Of each variant's adapters `train_s` and `adapter_mb`.
        seed: Of the intervals.
    """
    table = _Table(measured, data, seed)
    rows = table.bare_rows()
    for number in measured.routed:
        rows += table.routed_rows(number)
    for variant, number in measured.merged:
        rows += table.merged_rows(variant, number)
    for variant, figures in trained.items():
        for name in ("train_s", "adapter_mb"):
            values = [one[name] for one in figures]
            mean = float(np.mean(values))
            rows.append(Row(variant, "adapt", name, "a request", mean, None, None, len(values)))
    return rows


class _Table:
    """Makes rows; a group says after how many requests, and of which questions."""

    def __init__(self, measured: Measured, data: ContinualData, seed: int) -> None:
        self.measured, self.data, self.seed = measured, data, seed

    def bare_rows(self) -> list[Row]:
        count = len(self.data.requests)
        rows = []
        for name, one in (("full", self.measured.full), ("retained", self.measured.retained)):
            for what, requests in (("request 1", 1), ("all requests", count)):
                rows += self._forget(name, "none", "bare", what, one, requests)
            rows += self._kept(name, "none", "bare", one)
        return rows

    def routed_rows(self, number: int) -> list[Row]:
        one = self.measured.routed[number]
        first = self.measured.routed[min(self.measured.routed)]
        rows = self._system(self._bundle_variant(), ROUTED, number, one, first)
        return [*rows, *self._routing(number, one)]

    def merged_rows(self, variant: Variant, number: int) -> list[Row]:
        found = self.measured.merged
        first = found[variant, min(count for name, count in found if name == variant)]
        one = found[variant, number]
        rows = self._system(variant, MERGED, number, one, first)
        for side, value in one.cosines.items():
            rows.append(
                Row(variant, MERGED, f"largest cosine, {side}", _after(number), value, None, None,
                    number)
            )  # fmt: skip
        return rows

    def _bundle_variant(self) -> str:
        return next(iter(self.measured.merged))[0]

    # --- Forgetting ----------------------------------------------------------------------------

    def _system(
        self, system: str, route: str, number: int, one: Figures, first: Figures
    ) -> list[Row]:
        group = _after(number)
        rows = self._forget(system, route, group, "request 1", one, 1)
        if one is not first:
            rows += self._drift(system, route, group, one, first)
        rows += self._forget(system, route, group, "all requests", one, number)
        return rows + self._kept(system, route, group, one)

    def _forget(
        self, system: str, route: str, group: str, what: str, one: Figures, requests: int
    ) -> list[Row]:
        """Rows of the first requests' questions, beside *retained*."""
        ours = self._of_first(one, requests)
        theirs = self._of_first(self.measured.retained, requests)
        rows = []
        for measure, values, reference in (
            ("probability", ours.probability, theirs.probability),
            ("exact memorisation", ours.exact, theirs.exact),
            ("extraction strength", ours.extraction, theirs.extraction),
        ):
            name = f"{what}: {measure}"
            mean = float(np.mean(values))
            rows.append(Row(system, route, name, group, mean, None, None, len(values)))
            apart = comparisons.paired_difference(values, reference, seed=self.seed)
            rows.append(_estimate(system, route, f"{name} - retained", group, apart, len(values)))
        count = len(ours.exact)
        members = _membership(ours, one)
        known = _membership(theirs, self.measured.retained)
        auc = comparisons.membership_auc(*members, seed=self.seed)
        apart = comparisons.auc_difference(members, known, seed=self.seed)
        name = f"{what}: {ATTACK} AUC"
        rows.append(_estimate(system, route, name, group, auc, count))
        rows.append(_estimate(system, route, f"{name} - retained", group, apart, count))
        return rows

    def _drift(
        self, system: str, route: str, group: str, one: Figures, first: Figures
    ) -> list[Row]:
        """What later requests did to the first one's figures."""
        ours, then = (self._of_first(figures, 1) for figures in (one, first))
        count, rows = len(ours.exact), []
        for measure, values, earlier in (
            ("probability", ours.probability, then.probability),
            ("exact memorisation", ours.exact, then.exact),
        ):
            apart = comparisons.paired_difference(values, earlier, seed=self.seed)
            name = f"request 1: {measure} - then"
            rows.append(_estimate(system, route, name, group, apart, count))
        members, before = _membership(ours, one), _membership(then, first)
        apart = comparisons.auc_difference(members, before, seed=self.seed)
        name = f"request 1: {ATTACK} AUC - then"
        rows.append(_estimate(system, route, name, group, apart, count))
        return rows

    def _of_first(self, one: Figures, requests: int) -> Likelihoods:
        """Return the likelihoods of the first requests' questions."""
        count = sum(len(questions) for questions in self.data.requests[:requests])
        whole = one.likelihoods["forget"]
        attacks = {name: values[:count] for name, values in whole.attacks.items()}
        return Likelihoods(
            probability=whole.probability[:count],
            extraction=whole.extraction[:count],
            exact=whole.exact[:count],
            attacks=attacks,
        )

    # --- What is kept, and who was taken for whom ----------------------------------------------

    def _kept(self, system: str, route: str, group: str, one: Figures) -> list[Row]:
        rows = []
        for kind in self.data.kept:
            values = one.likelihoods[kind].probability
            before = self.measured.full.likelihoods[kind].probability
            apart = comparisons.paired_difference(values, before, seed=self.seed)
            place, count = f"{group}: {kind}", len(values)
            mean = float(np.mean(values))
            rows.append(Row(system, route, "kept: probability", place, mean, None, None, count))
            name = "kept: probability - full"
            rows.append(_estimate(system, route, name, place, apart, count))
        return rows

    def _routing(self, number: int, one: Figures) -> list[Row]:
        rows = []
        for kind, outcomes in one.outcomes.items():
            rates = _RATES if kind not in self.data.kept else {"passed": ("passed",)}
            for measure, wanted in rates.items():
                found = share(sum(word in wanted for word in outcomes), len(outcomes))
                rows.append(
                    Row(self._bundle_variant(), ROUTED, f"router: {measure}",
                        f"{_after(number)}: {kind}", found.rate, found.low, found.high,
                        len(outcomes))
                )  # fmt: skip
        return rows


def _membership(found: Likelihoods, one: Figures) -> tuple[list[float], list[float]]:
    """Return the scores of members, and of a system's non-members."""
    return found.attacks[ATTACK], one.likelihoods["others"].attacks[ATTACK]


def _after(number: int) -> str:
    return f"after {number}"


def _estimate(
    system: str, route: str, measure: str, group: str, found: comparisons.Estimate, count: int
) -> Row:
    return Row(system, route, measure, group, found.value, found.low, found.high, count)


def plot_sequence(path: Path, measured: Measured, data: ContinualData) -> None:
    """Draw the mean probability of request 1's answers over the number of requests."""
    count = len(data.requests[0])
    curves: dict[str, Curve] = {}
    for name, figures in _lines(measured).items():
        numbers = np.array(sorted(figures), dtype=np.float32)
        values = [
            float(np.mean(figures[int(number)].likelihoods["forget"].probability[:count]))
            for number in numbers
        ]
        curves[name] = (numbers, np.array(values, dtype=np.float32))
    plot_lines(path, curves, "requests so far", "probability of request 1's answers")


def _lines(measured: Measured) -> dict[str, dict[int, Figures]]:
    """Return what is drawn: by number of requests, by name."""
    numbers = list(measured.routed)
    found = {
        "full": dict.fromkeys(numbers, measured.full),
        "retained": dict.fromkeys(numbers, measured.retained),
        ROUTED: dict(measured.routed),
    }
    for variant, number in measured.merged:
        found.setdefault(f"{MERGED}, {variant}", {})[number] = measured.merged[variant, number]
    return found
